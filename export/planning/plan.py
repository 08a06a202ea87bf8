"""Planning of an export from its options and the files to read, before any of it is done."""

import copy
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from export.checkpoints.adapters import open_adapters
from export.checkpoints.layouts import BUILT_IN, Checkpoint, open_checkpoint
from export.lowering.backends import BACKENDS, check
from export.lowering.export_cache import source_digest, versions
from export.lowering.slices import sliced
from export.lowering.trace import GraphOptions
from export.planning.jinja_reduction import Chosen, chosen
from export.planning.memory import activation_bytes, check_caches, matrix_bytes
from export.planning.sharding import Sharding
from export.planning.warnings import warnings_of
from export.quality.gptq import CalibrationText
from export.weights.formats.integer import ROUNDINGS
from export.weights.gguf_types import QUANTIZE, default_scheme, named_scheme, unkept
from export.weights.scheme import CALIBRATIONS, GPTQ, IMPORTANCE, Scheme, adjusted, computes_all_experts, swaps_pairs
from export.weights.source import WeightSource
from model.alibi import alibi_slopes
from model.config import ModelConfig
from model.errors import InputError
from model.kv_row_format import KV_DTYPES
from model.rotary import inverse_frequencies
from preproc import rope
from preproc.tokenizer import HUGGING_FACE, Tokenizer, from_bytes, open_tokenizer
from runtime.engine.executorch import lacking
from runtime.pte.metadata import FORMAT_VERSION, NO_TOKENIZER, Metadata, MethodSpec, export_identity
from runtime.pte.parts import session_methods

if TYPE_CHECKING:  # takes seconds to import, and plans that are only described do without it
    from export.lowering.assemble import Assembled

DEFAULT_CONTEXT = 2048
"""Maximum of the default max_seq_len, because the size of the caches grows with it."""

MAX_ROWS = 8
"""Maximum number of rows of logits that a step returns. Speculative decoding checks drafted tokens with them."""

DEFAULT_CHUNK = 128
"""Default prefill chunk. Smaller chunks read the weights more often; activations of larger ones exceed CPU caches."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        checkpoint: file or folder in any layout of `export.checkpoints.layouts`, or a name on the Hugging Face hub.
        tokenizer: tokenizer file; None for the checkpoint's own, "none" for an export without a tokenizer.
        output: the .pte to write, or the folder of shards or slices; None for a path in the current folder named after
            the checkpoint.
        max_seq_len: capacity of the KV cache; None for the checkpoint's context, at most DEFAULT_CONTEXT.
        prefill_chunk: number of tokens per prefill step; None for DEFAULT_CHUNK, or max_seq_len if that is less.
        backend: one of `export.lowering.backends.BACKENDS`.
        attention: one of the backend's forms; None for its first, or "aten" without a KV cache or where all experts of
            a mixture are computed.
        quantize: storage scheme of weights, one of `export.weights.gguf_types.QUANTIZE`; None for the types that a GGUF
            has, and float32 for other checkpoints.
        group_size, embedding_bits, head_bits, rounding: changes of the scheme, see `export.weights.scheme.adjusted`.
        calibrate: text on which weights are calibrated, see `export.quality.gptq.CalibrationText.of`.
        batch_size: number of texts that are extended at once, see `runtime.batch`.
        sharding: division into shards or slices, each a file in the folder `output`.
        kv_dtype: dtype of the KV caches, one of `model.kv_row_format.KV_DTYPES`.
        kv_cache: whether the methods take and extend a KV cache; otherwise each step takes the whole text.
        hidden_states: whether the methods also return the normalised output of the last block.
        original_context: whether to use the context that the model had before it was extended.
        auto: whether to select the smallest scheme that passes, instead of `quantize`.
        chat_template: name or file, see `export.planning.jinja_reduction.chosen`; None for the checkpoint's own.
        eval_text, max_ppl_increase: test of a quantised model, see `export.quality.perplexity.Gate`.
        hub_token, cache_dir: settings for a name on the hub, see `export.checkpoints.hub.download`.
        force: whether to export even if the output is up to date.
        cache: whether to use the cache of lowered blocks and verifications.
        lora: adapters to merge into the weights, each FOLDER or FOLDER:scale, see `export.checkpoints.adapters`.
    """

    checkpoint: Path = BUILT_IN
    tokenizer: Path | None = None
    output: Path | None = None
    max_seq_len: int | None = None
    prefill_chunk: int | None = None
    backend: str = "xnnpack"
    attention: str | None = None
    quantize: str | None = None
    group_size: int | None = None
    embedding_bits: int | None = None
    head_bits: int | None = None
    rounding: str = "nearest"
    calibrate: Path | None = None
    batch_size: int = 1
    sharding: Sharding = field(default_factory=Sharding)
    kv_dtype: str = "fp32"
    kv_cache: bool = True
    hidden_states: bool = False
    original_context: bool = False
    auto: bool = False
    eval_text: Path | None = None
    max_ppl_increase: float | None = None
    chat_template: str | None = None
    hub_token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    force: bool = False
    cache: bool = True
    lora: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.auto and (self.quantize or self.group_size or self.embedding_bits or self.head_bits):
            raise InputError(
                "--auto chooses the scheme; leave --quantize, --group-size, --embedding-bits and --head-bits out"
            )
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise InputError(f"--max-seq-len {self.max_seq_len} is invalid; give 1 or more")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise InputError(f"--prefill-chunk {self.prefill_chunk} is invalid; give 1 or more")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size} is invalid; give 1 or more")
        for flag, value, known in (
            ("quantize", self.quantize, (None, *QUANTIZE)),
            ("rounding", self.rounding, (*ROUNDINGS, *CALIBRATIONS)),
            ("kv-dtype", self.kv_dtype, KV_DTYPES),
        ):
            if value not in known:
                raise InputError(f"--{flag} {value} is unknown; choose from {', '.join(filter(None, known))}")
        if self.calibrate and self.rounding not in ("nearest", *CALIBRATIONS):
            raise InputError(f"--rounding {self.rounding} has no effect with --calibrate; leave one of them out")
        check(self.backend)
        able = BACKENDS[self.backend].attention
        if self.attention not in (None, *able):
            flag = f"--attention {self.attention}"
            raise InputError(f"{flag} is unsupported by --backend {self.backend}; choose from {', '.join(able)}")
        if self.attention == "fused" and not self.kv_cache:
            raise InputError("--attention fused needs a KV cache; leave --attention fused or --no-kv-cache out")


@dataclass(frozen=True)
class Plan:
    """An export with all its details decided.

    Attributes:
        source: weights of the model.
        graph: options of the methods' inputs and outputs.
        sharding: division into shards or slices.
        tokenizer: tokenizer for the first shard or for each slice, or None.
        provenance: everything that determines the output: files with equal provenance are equal.
        output: file or folder to write.
        summary: description of the checkpoint.
        warnings: messages for the user before the export.
        texts: token ids for calibration; empty if the scheme is not calibrated.
    """

    source: WeightSource
    graph: GraphOptions
    sharding: Sharding
    tokenizer: Tokenizer | None
    provenance: dict[str, Any]
    output: Path
    summary: str
    warnings: tuple[str, ...]
    texts: Sequence[Sequence[int]] = ()

    def with_scheme(self, quantize: str, scheme: Scheme) -> "Plan":
        """Returns the same export with another scheme, given the name of its base in SCHEMES and the scheme itself."""
        graph = _with_rows(self.graph, self.source.config, scheme, self.sharding)
        provenance = copy.deepcopy(self.provenance)
        provenance["options"] |= asdict(graph) | {"quantize": quantize, "scheme": scheme.to_json()}
        return replace(self, source=self.source.with_scheme(scheme), graph=graph, provenance=provenance)

    @functools.cached_property
    def shards(self) -> tuple[tuple[MethodSpec, ...], ...]:
        """Methods of each shard or slice; a single entry if the model is not divided."""
        return self.sharding.methods(self.source.config, self.graph, self.source.scheme)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Path of each shard's or slice's file."""
        if self.sharding.is_whole:
            return (self.output,)
        count = len(self.shards)
        return tuple(self.output / f"{number}-of-{count}.pte" for number in range(1, count + 1))

    @property
    def identity(self) -> str:
        """String that is equal for exports that are equal byte for byte."""
        return export_identity(self.provenance)

    def metadata(self, assembled: "Assembled", methods: tuple[MethodSpec, ...]) -> Metadata:
        """Returns the metadata of a shard's or slice's file: everything it contains besides graph and weights."""
        config, max_seq_len = self.source.config, self.graph.max_seq_len
        part = sliced(config, methods[0].slices)
        span = range(methods[0].start_layer, methods[-1].end_layer)
        cos, sin = rope.tables(config, max_seq_len)
        tokenizer = self.tokenizer if methods[0].start_layer == 0 else None
        return Metadata(
            config=config,
            matrix_bytes=matrix_bytes(part, self.source.scheme, span),
            activation_bytes=self.graph.batch_size
            * max(activation_bytes(part, spec, max_seq_len) for spec in session_methods(methods)),
            max_seq_len=max_seq_len,
            batch_size=self.graph.batch_size,
            bos_id=self.provenance["bos_id"],
            stop_ids=tuple(self.provenance["stop_ids"]),
            methods=methods,
            requirements=assembled.requirements,
            provenance=self.provenance,
            rope_cos=cos,
            rope_sin=sin,
            rope_inverse_frequencies=inverse_frequencies(config, max_seq_len),
            alibi_slopes=alibi_slopes(config) if config.positions == "alibi" else torch.zeros(config.n_heads),
            tokenizer_kind=tokenizer.kind if tokenizer else NO_TOKENIZER,
            tokenizer=tokenizer.data if tokenizer else b"",
            chat_template=json.dumps(self.provenance["chat_template"]) if self.provenance.get("chat_template") else "",
            sampling=self.provenance.get("sampling", {}),
        )


def plan(options: ExportOptions) -> Plan:
    """Opens the files to read, and checks them and the options.

    Raises:
        InputError: checkpoint, tokenizer or options cannot be used.
    """
    adapters = open_adapters(options.lora, options.hub_token, options.cache_dir)
    checkpoint = open_checkpoint(options.checkpoint, options.hub_token, options.cache_dir, adapters)
    tokenizer = _tokenizer(checkpoint, options)
    quantize, scheme, graph = decided(checkpoint, options)
    config = checkpoint.config.for_length(graph.max_seq_len)
    text = CalibrationText.of(options.calibrate, scheme.rounding)
    if text and scheme.rounding != IMPORTANCE:
        scheme = replace(scheme, rounding=GPTQ)
    source = WeightSource(config, checkpoint.weights, scheme, None, options.sharding.slices, checkpoint.blocks)
    if text and not options.auto:
        text.check(source)
    check(options.backend, {form.kind for form in scheme.formats})
    suffix = "pte" if options.sharding.is_whole else "shards" if options.sharding.slices == 1 else "slices"
    output = options.output or Path(f"{_name(options.checkpoint)}.{suffix}")
    if output.resolve() in {file.resolve() for file in (*checkpoint.files, options.tokenizer or output.parent)}:
        raise InputError(f"--output {output} is one of the checkpoint's files; give another name")
    provenance = _provenance(checkpoint, tokenizer, options, graph, quantize, scheme)
    chat = chosen(options.chat_template, checkpoint, tokenizer)
    provenance |= _chat(chat, tokenizer, provenance)
    provenance["adapters"] = [adapter.record for adapter in adapters]
    provenance["calibration"] = {"sha256": text.sha256} if text else None
    return Plan(
        source=source,
        graph=graph,
        sharding=options.sharding,
        tokenizer=tokenizer,
        provenance=provenance,
        output=output,
        summary="; ".join((f"{checkpoint.layout}, {_dimensions(config)}", *checkpoint.notes)),
        warnings=(
            *warnings_of(checkpoint, tokenizer, graph.max_seq_len, provenance["stop_ids"]),
            *unkept(quantize, config, checkpoint.types),
            *chat.warnings,
        ),
        texts=text.windows(tokenizer, provenance["bos_id"], graph.max_seq_len) if text else (),
    )


def decided(checkpoint: Checkpoint, options: ExportOptions) -> tuple[str, Scheme, GraphOptions]:
    """Returns the name of the scheme in QUANTIZE, the scheme, and the options of the methods. Reads no weights.

    Raises:
        InputError: the options cannot be used for this checkpoint.
    """
    able = BACKENDS[options.backend].formats
    quantize = options.quantize or ("fp32" if options.auto else default_scheme(checkpoint.types, able))
    scheme = adjusted(
        named_scheme(quantize, checkpoint.config, checkpoint.types),
        options.group_size,
        options.embedding_bits,
        options.head_bits,
        options.rounding,
        one_table=checkpoint.config.tied and not options.sharding.has_shards,
    )
    scheme = replace(scheme, kv_dtype=KV_DTYPES[options.kv_dtype])
    graph = _graph(checkpoint.config, options, scheme)
    config = checkpoint.config.for_length(graph.max_seq_len)
    return quantize, scheme, _with_rows(graph, config, scheme, options.sharding)


def _tokenizer(checkpoint: Checkpoint, options: ExportOptions) -> Tokenizer | None:
    given = options.tokenizer or checkpoint.tokenizer
    if given is None:
        raise InputError(f"{options.checkpoint} has no tokenizer; give --tokenizer FILE, or none to export without one")
    if str(given) == NO_TOKENIZER:
        return None
    name = f"tokenizer {given}" if isinstance(given, Path) else f"the tokenizer in {options.checkpoint}"
    tokenizer = open_tokenizer(given) if isinstance(given, Path) else from_bytes(given())
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise InputError(
            f"{name} has {tokenizer.vocab_size} ids, but the model has {checkpoint.config.vocab_size}; "
            "give the one the model was trained with"
        )
    return tokenizer


def _graph(config: ModelConfig, options: ExportOptions, scheme: Scheme) -> GraphOptions:
    """Returns the options of the graphs, checked against the model and this machine."""
    scaling = config.rope_scaling
    if options.original_context and scaling is None:
        raise InputError("--original-context needs a model with an extended context, unlike this one; leave it out")
    limit = scaling.original_context if options.original_context and scaling else config.context
    max_seq_len = options.max_seq_len or min(limit, DEFAULT_CONTEXT)
    if max_seq_len > limit and (options.original_context or config.positions == "learned"):
        why = "--original-context allows" if options.original_context else "the model has learned positions for"
        raise InputError(f"--max-seq-len {max_seq_len} is too large: {why} {limit}; give at most that")
    chunk = options.prefill_chunk or min(DEFAULT_CHUNK, max_seq_len)
    if chunk > max_seq_len:
        raise InputError(f"--prefill-chunk {chunk} is larger than --max-seq-len {max_seq_len}; give at most that")
    check_caches(config, max_seq_len, options.kv_cache * options.batch_size, KV_DTYPES[options.kv_dtype])
    computes_all = computes_all_experts(config, scheme)  # with dynamic slices, which backends do not support
    is_static = computes_all or not options.kv_cache
    attention = options.attention or ("aten" if is_static else BACKENDS[options.backend].attention[0])
    if attention == "fused" and computes_all:
        raise InputError(
            "--attention fused needs one of GGUF's types for a mixture of experts; give --quantize q8_0 or such, or "
            "--attention aten"
        )
    if attention == "aten" and options.kv_dtype != "fp32":
        raise InputError(f"--kv-dtype {options.kv_dtype} is unsupported with --attention aten; leave --kv-dtype out")
    if attention == "aten" and options.batch_size > 1:
        raise InputError(
            f"--batch-size {options.batch_size} is unsupported with --attention aten; leave --batch-size out"
        )
    graph = GraphOptions(max_seq_len, chunk, attention, options.kv_cache, options.hidden_states, options.batch_size)
    options.sharding.check(graph)
    return graph


def _with_rows(graph: GraphOptions, config: ModelConfig, scheme: Scheme, sharding: Sharding) -> GraphOptions:
    """Returns the options with the maximum number of rows of logits that the head supports."""
    last = sharding.spans(config, scheme)[-1]
    return replace(graph, max_rows=1 if graph.attention == "aten" or swaps_pairs(config, last, scheme) else MAX_ROWS)


def _dimensions(config: ModelConfig) -> str:
    return f"{config.n_layers} layers, dim {config.dim}, vocabulary {config.vocab_size}"


def _name(checkpoint: Path) -> str:
    """Returns the checkpoint's name for the output. A folder's may contain dots, as in Llama-3.2-1B, and is not cut."""
    path = Path(os.path.abspath(checkpoint))  # not resolved: a symbolic link keeps its own name
    return path.stem if path.is_file() else path.name


def _provenance(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    options: ExportOptions,
    graph: GraphOptions,
    quantize: str,
    scheme: Scheme,
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "checkpoint": {"layout": checkpoint.layout, "xxh3_128": checkpoint.digest()},
        "bos_id": _bos_id(checkpoint, tokenizer, is_given=options.tokenizer is not None),
        "stop_ids": list(checkpoint.stop_ids or (tokenizer.stop_ids if tokenizer else ())),
        "sampling": dict(checkpoint.sampling),
        "tokenizer": {"sha256": hashlib.sha256(tokenizer.data).hexdigest()} if tokenizer else None,
        "options": {
            **asdict(graph),
            "backend": options.backend,
            "quantize": quantize,
            "scheme": scheme.to_json(),
            "tensor_parallel": options.sharding.slices,
        },
        "versions": versions(),
        "source": {"sha256": source_digest()},
        "verified": not lacking([BACKENDS[options.backend].runtime]),
    }


def _bos_id(checkpoint: Checkpoint, tokenizer: Tokenizer | None, is_given: bool) -> int | None:
    """Returns the BOS id of a tokenizer.json given as an option, else of the checkpoint, else of another tokenizer."""
    if tokenizer and is_given and tokenizer.kind == HUGGING_FACE:
        return tokenizer.bos_id
    if checkpoint.adds_bos is False:
        return None
    return checkpoint.bos_id if checkpoint.bos_id is not None or tokenizer is None else tokenizer.bos_id


def _chat(chat: Chosen, tokenizer: Tokenizer | None, ids: dict[str, Any]) -> dict[str, Any]:
    """Returns a chat template's part of the provenance: the template, and stop ids with the one that ends an answer."""
    if chat.template is None or tokenizer is None:
        return {"chat_template": None}
    stop_ids = chat.template.stop_ids(tokenizer, ids["bos_id"], ids["stop_ids"])
    return {"chat_template": chat.file, "stop_ids": list(stop_ids)}
