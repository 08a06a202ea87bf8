"""The contract between export and the runtimes: the metadata in a file, its names, and the format version.

All metadata is data inside the program, one constant method per line of FIELDS, so that any ExecuTorch runtime can read
it. The program is followed by a trailer of 32 bytes, which shows whether a file is complete, undamaged and of a known
version before anything else is read.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from model.config import ModelConfig
from model.errors import InputError
from preproc.position_inputs import Positions

FORMAT_VERSION = 4

FIELDS: dict[str, tuple[str, str]] = {
    "get_max_seq_len": ("int", "capacity of the KV cache in positions (T): prompt and answer together"),
    "get_max_context_len": ("int", "the same number, under the name that ExecuTorch's own runners read"),
    "get_vocab_size": ("int", "width of the logits (V)"),
    "get_matrix_bytes": (
        "int",
        "bytes of the matrices that decoding reads for each token, with all experts of a mixture",
    ),
    "get_activation_bytes": (
        "int",
        "upper estimate of the memory that the longest step needs besides weights and caches, in bytes",
    ),
    "get_n_layers": ("int", "number of blocks"),
    "get_batch_size": ("int", "number of texts that the methods process at once (B)"),
    "get_bos_id": ("int", "id that starts a text; -1 for none"),
    "get_eos_ids": ("int list", "ids that end a text; may be empty"),
    "use_kv_cache": ("bool", "whether the methods take and extend a KV cache; otherwise each takes the whole text"),
    "get_config": ("JSON", "model.config.ModelConfig: dimensions and features of the model"),
    "get_methods": ("JSON", "list of MethodSpec: each method's inputs and outputs by name, shape and dtype"),
    "get_requirements": ("JSON", "backends and operators that the runtime must have, and the version of ExecuTorch"),
    "get_provenance": ("JSON", "versions, options, and digests of checkpoint and tokenizer from the export"),
    "get_rope_cos": (
        "float32 [T, P]",
        "cosine of the rotary angles of every position, for the P rotated pairs of a head",
    ),
    "get_rope_sin": ("float32 [T, P]", "sine of the same angles"),
    "get_rope_inverse_frequencies": (
        "float32 [P]",
        "inverse frequencies of the angles, for runtimes that compute them",
    ),
    "get_alibi_slopes": ("float32 [H]", "ALiBi slope of each head; 0 without ALiBi"),
    "get_sliding_window": (
        "int",
        "number of positions that a local block sees, including the current one; 0 for no local blocks",
    ),
    "get_tokenizer_kind": ("string", "sentencepiece, tiktoken, tokenizer.json or none"),
    "get_tokenizer": ("uint8 [bytes]", "bytes of the tokenizer file; one zero byte for none"),
    "get_chat_template": (
        "JSON",
        "chat template, see preproc.jinja_template.to_file; empty for none",
    ),
    "get_sampling": (
        "JSON",
        "sampling options that the checkpoint recommends, any of temperature, top_k, top_p, repetition_penalty",
    ),
}
"""Constant method -> its type and meaning: all contents of a file other than graph and weights."""

NO_TOKENIZER = "none"

STREAM = "stream"
"""The residual stream between two blocks, which a shard passes to the next; or a slice's summand of it."""

K_CACHE, V_CACHE = CACHES = ("k_cache", "v_cache")
"""The roles of a layer's cached keys and values."""

K_ROWS, V_ROWS = ROWS = ("k_rows", "v_rows")
"""The roles of the keys and values that a step adds to the caches."""


def of_layer(role: str, layer: int) -> str:
    """Returns the name of a layer's tensor, such as k_cache.3."""
    return f"{role}.{layer}"


def role_and_layer(name: str) -> tuple[str, int | None]:
    """Splits a tensor's name into role and layer; the layer is None if the tensor belongs to no layer."""
    role, _, layer = name.partition(".")
    return role, int(layer) if layer else None


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a method.

    Attributes:
        name: the role, and the layer if it belongs to one: tokens, select, logits, hidden; inputs that depend on the
            position, see `preproc.position_inputs`; k_cache.3, v_cache.3, k_rows.3, v_rows.3 for layer 3; and STREAM.
        shape: sizes; "L" is the length of a step, and "R" its rows of logits, where they are not fixed.
        dtype: name of the torch dtype, such as float32 or int64.
    """

    name: str
    shape: tuple[int | Literal["L", "R"], ...]
    dtype: str

    @property
    def role(self) -> str:
        """The role without the layer, such as k_cache."""
        return role_and_layer(self.name)[0]

    @property
    def layer(self) -> int | None:
        """The layer to which the tensor belongs; None if it belongs to no layer."""
        return role_and_layer(self.name)[1]

    @property
    def is_cache(self) -> bool:
        """Whether the tensor is a KV cache."""
        return self.role in CACHES

    @property
    def is_rows(self) -> bool:
        """Whether the tensor is the rows that a step adds to a KV cache."""
        return self.role in ROWS

    @property
    def rows(self) -> str:
        """The name of the rows that a step adds to this cache, such as k_rows.3."""
        role, layer = role_and_layer(self.name)
        assert layer is not None, f"{self.name} is no cache"
        return of_layer(dict(zip(CACHES, ROWS, strict=True))[role], layer)

    def sizes(self, length: int, rows: int = 1) -> tuple[int, ...]:
        """Returns the shape for a step of `length` tokens and `rows` rows of logits."""
        return tuple({"L": length, "R": rows}[size] if isinstance(size, str) else size for size in self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes of a tensor whose shape does not depend on the step."""
        return math.prod(self.sizes(1)) * int(getattr(torch, self.dtype).itemsize)

    def zeros(self, length: int, rows: int = 1) -> Tensor:
        """Returns a tensor of zeros with this shape and dtype."""
        return torch.zeros(self.sizes(length, rows), dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class MethodSpec:
    """One method of the program: it runs a range of layers for a range of lengths.

    A runtime fills inputs by name, so a file may omit or add inputs without changing the format: a mask per kind of
    attention, position ids instead of a mask, hidden states between shards.

    Attributes:
        name: name of the ExecuTorch method.
        min_length, max_length: the range of lengths L; equal if the graph is static.
        max_rows: maximum number of rows of logits (R) for each sequence; 1 or more.
        start_layer, end_layer: the blocks that it runs, end excluded.
        inputs, outputs: the specs in the order of the method's arguments and results.
        slice, slices: index of its slice of the model, from 0, and number of slices; see `model.tensor_parallel`.
    """

    name: str
    min_length: int
    max_length: int
    max_rows: int
    start_layer: int
    end_layer: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    slice: int = 0
    slices: int = 1

    @property
    def half(self) -> str:
        """The part of a slice that it runs: embed, attend.3, feed.3 or head; "" if the model is not sliced.

        See `model.tensor_parallel.SlicedLlama`.
        """
        return self.name.partition(".")[2]

    @property
    def whole(self) -> str:
        """The name of the method of which it is a half; its own name if the model is not sliced."""
        return self.name.partition(".")[0]

    @property
    def caches(self) -> list[TensorSpec]:
        """The specs of the KV caches that the method takes."""
        return [spec for spec in self.inputs if spec.is_cache]

    @property
    def span(self) -> range:
        """The blocks that it runs."""
        return range(self.start_layer, self.end_layer)

    @property
    def is_fused(self) -> bool:
        """Whether attention is one operator, whose input is the step's start position instead of a mask."""
        return any(spec.name == "start" for spec in self.inputs)


@dataclass(frozen=True)
class Requirements:
    """The ExecuTorch version that made the program, and the backends and operators that a runtime needs to load it."""

    executorch: str
    backends: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Metadata:
    """The contents of a file other than graph and weights, as in FIELDS; bos_id is None if there is no BOS."""

    config: ModelConfig
    matrix_bytes: int
    activation_bytes: int
    max_seq_len: int
    batch_size: int
    bos_id: int | None
    stop_ids: tuple[int, ...]
    methods: tuple[MethodSpec, ...]
    requirements: Requirements
    provenance: dict[str, Any]
    rope_cos: Tensor
    rope_sin: Tensor
    rope_inverse_frequencies: Tensor
    alibi_slopes: Tensor
    tokenizer_kind: str = NO_TOKENIZER
    tokenizer: bytes = b""
    chat_template: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> bytes:
        """A digest of 16 bytes, equal for files that were exported with the same options from the same checkpoint."""
        return xxhash.xxh3_128_digest(_json(self.provenance).encode())

    @property
    def span(self) -> range:
        """The blocks that the methods run; in a shard, fewer than config.n_layers."""
        return range(self.methods[0].start_layer, self.methods[-1].end_layer)

    @property
    def slice(self) -> int:
        """Index of the file's slice of the model, from 0; 0 if the model is not sliced."""
        return self.methods[0].slice

    @property
    def slices(self) -> int:
        """Number of slices; 1 if the model is not sliced."""
        return self.methods[0].slices

    @property
    def cache_bytes(self) -> int:
        """Size of the KV caches in bytes."""
        return sum(spec.nbytes for spec in self.caches)

    @property
    def use_kv_cache(self) -> bool:
        """Whether the methods take and extend a KV cache."""
        return bool(self.caches)

    @property
    def caches(self) -> list[TensorSpec]:
        """The KV caches that the methods take."""
        return list({spec.name: spec for method in self.methods for spec in method.caches}.values())

    @property
    def chunk(self) -> int:
        """Maximum number of tokens in one step."""
        return max(method.max_length for method in self.methods)

    @property
    def positions(self) -> Positions:
        """The tables from which the inputs that depend on the position are made."""
        slopes = self.alibi_slopes if self.config.positions == "alibi" else torch.zeros(0)
        return Positions(self.rope_cos, self.rope_sin, slopes, self.config.sliding_window, self.max_seq_len)


def export_identity(provenance: Mapping[str, Any]) -> str:
    """Returns a digest in hexadecimal digits that is equal for exports that are the same byte for byte."""
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()


def to_constants(metadata: Metadata) -> dict[str, Any]:
    """Returns the values of the constant methods, by the names in FIELDS."""
    return {
        "get_max_seq_len": metadata.max_seq_len,
        "get_max_context_len": metadata.max_seq_len,
        "get_vocab_size": metadata.config.vocab_size,
        "get_matrix_bytes": metadata.matrix_bytes,
        "get_activation_bytes": metadata.activation_bytes,
        "get_n_layers": metadata.config.n_layers,
        "get_batch_size": metadata.batch_size,
        "get_bos_id": -1 if metadata.bos_id is None else metadata.bos_id,
        "get_eos_ids": list(metadata.stop_ids),
        "use_kv_cache": metadata.use_kv_cache,
        "get_config": _json(metadata.config),
        "get_methods": _json(metadata.methods),
        "get_requirements": _json(metadata.requirements),
        "get_provenance": _json(metadata.provenance),
        "get_rope_cos": metadata.rope_cos,
        "get_rope_sin": metadata.rope_sin,
        "get_rope_inverse_frequencies": metadata.rope_inverse_frequencies,
        "get_alibi_slopes": metadata.alibi_slopes,
        "get_sliding_window": metadata.config.sliding_window or 0,
        "get_tokenizer_kind": metadata.tokenizer_kind,
        "get_tokenizer": torch.frombuffer(bytearray(metadata.tokenizer or b"\0"), dtype=torch.uint8),
        "get_chat_template": metadata.chat_template,
        "get_sampling": _json(metadata.sampling),
    }


def from_constants(call: Callable[[str], Sequence[Any]]) -> Metadata:
    """Reads the metadata from constant methods; `call` runs one of them and returns its values.

    Raises:
        InputError: a value has the wrong form.
    """
    try:
        (kind,), (tokenizer,) = call("get_tokenizer_kind"), call("get_tokenizer")
        bos_id = call("get_bos_id")[0]
        return Metadata(
            config=ModelConfig.from_json(json.loads(call("get_config")[0])),
            matrix_bytes=call("get_matrix_bytes")[0],
            activation_bytes=call("get_activation_bytes")[0],
            max_seq_len=call("get_max_seq_len")[0],
            batch_size=call("get_batch_size")[0],
            bos_id=None if bos_id < 0 else bos_id,
            stop_ids=tuple(call("get_eos_ids")),
            methods=tuple(_method_spec(spec) for spec in json.loads(call("get_methods")[0])),
            requirements=Requirements(**_tuples(json.loads(call("get_requirements")[0]))),
            provenance=json.loads(call("get_provenance")[0]),
            rope_cos=call("get_rope_cos")[0].clone(),
            rope_sin=call("get_rope_sin")[0].clone(),
            rope_inverse_frequencies=call("get_rope_inverse_frequencies")[0].clone(),
            alibi_slopes=call("get_alibi_slopes")[0].clone(),
            tokenizer_kind=kind,
            tokenizer=b"" if kind == NO_TOKENIZER else tokenizer.numpy().tobytes(),
            chat_template=call("get_chat_template")[0],
            sampling=json.loads(call("get_sampling")[0]),
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"the file's metadata cannot be read ({error}); export it again") from error


def _json(value: Any) -> str:
    return json.dumps(value, default=dataclasses.asdict, sort_keys=True)


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


def _method_spec(spec: dict[str, Any]) -> MethodSpec:
    tensors = {key: tuple(TensorSpec(**_tuples(tensor)) for tensor in spec[key]) for key in ("inputs", "outputs")}
    return MethodSpec(**(spec | tensors))
