"""The parts shared by all checkpoint layouts: the opened Checkpoint, lazy weights, and the matching of weight names."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from model.config import ModelConfig
from model.errors import InputError, listed
from model.model import Llama


class LazyWeights(Mapping[str, Tensor]):
    """Maps names to tensors. A tensor is read from storage at each access and never kept."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


class StoredBlocks(NamedTuple):
    """A matrix in GGUF's blocks on storage.

    Attributes:
        kind: GGUF's name of the type, such as Q4_1.
        read: returns the blocks, uint8 [N, row bytes].
    """

    kind: str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class ChatSource:
    """A checkpoint's settings for chat; each is None if the checkpoint does not give it.

    Attributes:
        template: Jinja template that renders messages.
        bos_token, eos_token: texts of these tokens, as variables of the template.
    """

    template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened and checked. Its weights are still on storage.

    Attributes:
        config: dimensions and features of the model.
        weights: lazy state dict of `model.model.Llama`, in the dtype of the file.
        files: the files that make up the checkpoint, for `digest`.
        layout: name of the layout.
        architecture: the model's kind, as the checkpoint names it.
        notes: what is done to the weights when they are read, in words.
        bos_id: id that starts a text, or None if the checkpoint does not say.
        adds_bos: whether a text starts with BOS, or None if the checkpoint does not say.
        stop_ids: ids that end a text; empty if the checkpoint does not say.
        tokenizer: the checkpoint's tokenizer: its file, a function that returns the bytes of such a file, or None.
        chat: the checkpoint's settings for chat.
        sampling: recommended sampling options, a subset of SAMPLING.
        warnings: messages for the user before the export.
        types: GGUF's names of the types of all weights in a GGUF file, such as Q4_1 or F32; empty for other layouts.
        blocks: the weights that a GGUF file has in blocks which an operator runs.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    files: tuple[Path, ...]
    layout: str
    architecture: str = "llama"
    notes: tuple[str, ...] = ()
    bos_id: int | None = None
    adds_bos: bool | None = None
    stop_ids: tuple[int, ...] = ()
    tokenizer: Path | Callable[[], bytes] | None = None
    chat: ChatSource = ChatSource()
    sampling: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, StoredBlocks] = field(default_factory=dict)

    def digest(self) -> str:
        """Returns the XXH3-128 hash of the content of all files, in hex. It does not depend on their paths."""
        return content_digest(self.files)

    def build(self) -> Llama:
        """Returns the eager float32 model. float32 weights that are not reordered remain memory-mapped.

        A tied head becomes a separate parameter that shares the embedding's memory, so that a graph can hand it to a
        backend.
        """
        with torch.device("meta"):
            model = Llama(self.config)
        state = {name: tensor.float() for name, tensor in self.weights.items()}
        if self.config.tied:
            state["head.output.weight"] = state["tok_embeddings.weight"]
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every weight that a checkpoint of this config must contain."""
    with torch.device("meta"):
        state = Llama(config).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if not (config.tied and name == "head.output.weight")}


def half_split(weight: Tensor, n_heads: int, rotated: int) -> Tensor:
    """Reorders the first `rotated` rows of each head of wq or wk, [n*Dh, D], from interleaved rotary pairs (2i, 2i + 1)
    to half-split pairs (i, i + P).
    """
    heads = weight.view(n_heads, weight.shape[0] // n_heads, -1)
    pairs = heads[:, :rotated].reshape(n_heads, rotated // 2, 2, -1).transpose(1, 2).reshape(n_heads, rotated, -1)
    return torch.cat((pairs, heads[:, rotated:]), dim=1).view(weight.shape)


Index = tuple[slice, ...]
"""Index of a part of a tensor; () is the whole tensor."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor on storage: its shape, a function that reads a part of it, and whether it holds floats in a plain
    format.
    """

    shape: tuple[int, ...]
    read: Callable[[Index], Tensor]
    plain: bool = True


@dataclass(frozen=True)
class Storage:
    """Description of how a layout stores weights: their names, and the differences from the model's weights.

    Attributes:
        names: maps our name of a weight to the layout's, with stars for numbers. If several weights have the same name
            in the layout, they are rows of one tensor, in the order of this table.
        turns: number of parts into which each of these weights is divided within the tensor. With 2, the tensor has the
            first half of the rows of each weight, then the second halves. None stands for the number of KV heads.
        transposed: whether the blocks' matrices are stored as [in, out].
        interleaved: whether rotary pairs are rows (2i, 2i + 1), see `half_split`.
        norm_offset: number to add to the norms' weights.
        skipped_positions: number of rows before the embedding of position 0.
        converted: maps the last part of a weight's name to a function of the stored values.
    """

    names: Mapping[str, str]
    turns: int | None = 1
    transposed: bool = False
    interleaved: bool = False
    norm_offset: float = 0.0
    skipped_positions: int = 0
    converted: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


def starred(name: str) -> str:
    """Returns the name with each number replaced by a star."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def renamed(name: str, table: Mapping[str, str]) -> str:
    """Translates a weight's name in either direction, by a table in which stars stand for numbers."""
    numbers = (part for part in name.split(".") if part.isdigit())
    return ".".join(next(numbers) if part == "*" else part for part in table[starred(name)].split("."))


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor's values are usable as weights directly: neither integers nor floats that require a
    scale.
    """
    return tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Stored:
    """One tensor of a layout, and the model weights that are its rows.

    Attributes:
        name: name of the tensor in the layout.
        parts: names and shapes of the model weights, in order.
        transposed: whether the tensor is stored as [in, out].
        skipped: number of rows before those of the parts.
    """

    name: str
    parts: dict[str, tuple[int, ...]]
    transposed: bool
    skipped: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = list(self.parts.values())
        joined = (self.skipped + sum(rows for rows, *_ in shapes), *shapes[0][1:])
        return joined[::-1] if self.transposed else joined

    def indices(self, turns: int) -> dict[str, list[Index]]:
        """Returns the parts of the tensor that make up each model weight.

        Raises:
            InputError: the rows of a weight cannot be divided into `turns` equal parts.
        """
        if len(self.parts) == 1:
            return {name: [(slice(self.skipped, None),) if self.skipped else ()] for name in self.parts}
        found: dict[str, list[Index]] = {name: [] for name in self.parts}
        start = 0
        for _ in range(turns):
            for name, (rows, *_) in self.parts.items():
                if rows % turns:
                    raise InputError(
                        f"{self.name} has {rows} rows, which {turns} does not divide; give another checkpoint"
                    )
                piece = slice(start, start := start + rows // turns)
                found[name].append((slice(None), piece) if self.transposed else (piece,))
        return found


_MATCHING = "give a checkpoint whose configuration and weights belong together"


def match(
    path: Path, config: ModelConfig, sources: Mapping[str, TensorSource], storage: Storage, spare: Collection[str] = ()
) -> LazyWeights:
    """Finds every weight of the model among the sources.

    Args:
        path: path of the checkpoint, for messages.
        spare: names that may be present although they are not weights of the model.

    Raises:
        InputError: a weight is missing, unknown, quantised, or has the wrong shape. The message lists the names.
    """
    wanted = _wanted(config, storage)
    if missing := wanted.keys() - sources.keys():
        raise InputError(f"{path} lacks the weights {listed(missing)}; {_MATCHING}")
    if unknown := sources.keys() - wanted.keys() - set(spare):
        raise InputError(f"{path} has weights that its architecture does not have: {listed(unknown)}; {_MATCHING}")
    if coded := [name for name in wanted if not sources[name].plain]:
        raise InputError(f"{path} has quantised or integer weights: {listed(coded)}; give the unquantised checkpoint")
    for name, stored in wanted.items():
        if sources[name].shape != stored.shape:
            raise InputError(
                f"{name} in {path} has the shape {list(sources[name].shape)}, but its configuration needs "
                f"{list(stored.shape)}; {_MATCHING}"
            )
    return LazyWeights(
        {
            name: partial(_read, name, sources[stored.name], indices, stored.transposed, (config, storage))
            for stored in wanted.values()
            for name, indices in stored.indices(storage.turns or config.n_kv_heads).items()
        }
    )


def _wanted(config: ModelConfig, storage: Storage) -> dict[str, _Stored]:
    """Returns the tensors that the layout must contain, by their names."""
    order = {pattern: place for place, pattern in enumerate(storage.names)}
    wanted: dict[str, _Stored] = {}
    for name, shape in sorted(expected_shapes(config).items(), key=lambda item: order[starred(item[0])]):
        theirs = renamed(name, storage.names)
        transposed = storage.transposed and len(shape) == 2 and name.startswith("layers.")
        skipped = storage.skipped_positions if name == "pos_embeddings.weight" else 0
        wanted.setdefault(theirs, _Stored(theirs, {}, transposed, skipped)).parts[name] = shape
    return wanted


def _read(
    name: str, source: TensorSource, indices: list[Index], transposed: bool, layout: tuple[ModelConfig, Storage]
) -> Tensor:
    """Reads one weight of the model and converts it to the model's layout."""
    config, storage = layout
    pieces = [source.read(index) for index in indices]
    tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=int(transposed))
    if transposed:
        tensor = tensor.T.contiguous()
    if storage.norm_offset and name.endswith("norm.weight"):
        tensor = tensor.float() + storage.norm_offset
    if convert := storage.converted.get(name.rpartition(".")[2]):
        tensor = convert(tensor.float())
    return rotary_order(name, tensor, config) if storage.interleaved else tensor


def rotary_order(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """Returns the weight with half-split rotary pairs if it is a wq, wk, q_norm or k_norm with interleaved ones,
    otherwise unchanged.
    """
    role = name.split(".")[-2]
    if role in ("wq", "wk"):
        return half_split(weight, config.n_heads if role == "wq" else config.n_kv_heads, config.rotated)
    if role in ("q_norm", "k_norm"):
        return half_split(weight.flatten(), weight.numel() // config.head_dim, config.rotated).view(weight.shape)
    return weight


def token_ids(value: Any, name: str, path: Path, vocab_size: int) -> tuple[int, ...]:
    """Returns the token ids that a configuration gives under `name`: one, a list, or none.

    Raises:
        InputError: an id is not a whole number within the vocabulary.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InputError(f"{path} sets {name} to {value!r}; ids must be whole numbers from 0 to {vocab_size - 1}")
    return tuple(ids)


SAMPLING: dict[str, type] = {"temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}
"""Sampling options that a checkpoint may recommend, as in `runtime.text.sampler.SamplingOptions`, and their types."""


def recommended(settings: Mapping[str, Any], path: Path) -> dict[str, float]:
    """Returns the sampling options recommended by a generation_config.json. With do_sample false, only the repetition
    penalty is taken.

    Raises:
        InputError: a value is not a valid number.
    """
    found = {}
    for name, kind in SAMPLING.items():
        value = settings.get(name)
        if value is None or (settings.get("do_sample") is False and name != "repetition_penalty"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value or value < 0:
            raise InputError(f"{path} sets {name} to {value!r}, which is invalid; correct it or leave it out")
        found[name] = kind(value)
    return found


def read_head(path: Path, size: int) -> bytes:
    """Returns the first bytes of a file: fewer if it is shorter, and none if the path is not a file."""
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        return stream.read(size)


def content_digest(files: Iterable[Path]) -> str:
    """Returns the XXH3-128 hash of the content of files, one after another, in hex."""
    state = xxhash.xxh3_128()
    for file in files:
        with file.open("rb") as stream:
            while piece := stream.read(1 << 24):
                state.update(piece)
    return state.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        InputError: the file is not JSON or contains something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # utf-8-sig: editors on Windows may write a BOM
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); correct it, or download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} contains a {type(content).__name__}, not an object; correct it, or download it again")
    return content
