"""What every layout of checkpoint shares: the opened Checkpoint, lazy weights, and the matching of names."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from model.config import ModelConfig
from model.errors import InputError, listed
from model.model import Llama


class LazyWeights(Mapping[str, Tensor]):
    """Name -> tensor, read from storage each time it is asked for and never kept."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class ChatSource:
    """What a checkpoint says about talking with it; None where it says nothing.

    Attributes:
        template: Jinja that renders messages.
        bos_token, eos_token: texts that it may ask for.
    """

    template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened and checked, its weights still on storage.

    Attributes:
        config: the model's dimensions.
        weights: lazy state dict of `model.model.Llama`, in the file's own dtype.
        files: what the content consists of, for `digest`.
        layout: the layout's name.
        bos_id: the id that starts a text, where the checkpoint says so.
        adds_bos: whether one does, where the checkpoint says so.
        stop_ids: the ids that end a text, where the checkpoint says so.
        tokenizer: the tokenizer that belongs to it, where there is one: its file, or what makes the bytes of one.
        chat: how messages become a text.
        sampling: what it recommends of SAMPLING.
        warnings: what a person should know before.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    files: tuple[Path, ...]
    layout: str
    bos_id: int | None = None
    adds_bos: bool | None = None
    stop_ids: tuple[int, ...] = ()
    tokenizer: Path | Callable[[], bytes] | None = None
    chat: ChatSource = ChatSource()
    sampling: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def digest(self) -> str:
        """XXH3-128 over the content of all files, in hex: equal checkpoints have equal digests wherever they lie."""
        state = xxhash.xxh3_128()
        for file in self.files:
            with file.open("rb") as stream:
                while piece := stream.read(1 << 24):
                    state.update(piece)
        return state.hexdigest()

    def build(self) -> Llama:
        """The eager float32 model. float32 weights that need no reordering stay mapped.

        A tied head is a parameter of its own over the embedding's memory: a graph can then hand it to a backend.
        """
        with torch.device("meta"):
            model = Llama(self.config)
        state = {name: tensor.float() for name, tensor in self.weights.items()}
        if self.config.tied:
            state["head.output.weight"] = state["tok_embeddings.weight"]
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a checkpoint of this config must hold."""
    with torch.device("meta"):
        state = Llama(config).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if not (config.tied and name == "head.output.weight")}


def half_split(weight: Tensor, n_heads: int, rotated: int) -> Tensor:
    """Reorders the first `rotated` rows of each head of wq or wk, [n*Dh, D], from interleaved rotary pairs (2i, 2i + 1)
    to (i, i + P).
    """
    heads = weight.view(n_heads, weight.shape[0] // n_heads, -1)
    pairs = heads[:, :rotated].reshape(n_heads, rotated // 2, 2, -1).transpose(1, 2).reshape(n_heads, rotated, -1)
    return torch.cat((pairs, heads[:, rotated:]), dim=1).view(weight.shape)


Index = tuple[slice, ...]
"""Names a part of a tensor; () is all of it."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor on storage: its shape, how to read a part of it, and whether it holds floats of a plain format."""

    shape: tuple[int, ...]
    read: Callable[[Index], Tensor]
    plain: bool = True


@dataclass(frozen=True)
class Storage:
    """How a layout stores weights: under which names, and in what they differ from the model's.

    Attributes:
        names: our name -> the layout's, stars standing for numbers. Weights of ours that share one of its names are
            rows of one tensor, in the order of this table.
        turns: how often they take turns in it: 2 has half the rows of each, then the other halves.
        transposed: whether the blocks' matrices are stored [in, out].
        interleaved: whether rotary pairs are rows (2i, 2i + 1), see `half_split`.
        norm_offset: what the norms' weights lack.
    """

    names: Mapping[str, str]
    turns: int = 1
    transposed: bool = False
    interleaved: bool = False
    norm_offset: float = 0.0


def starred(name: str) -> str:
    """The name with a star for each number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def renamed(name: str, table: Mapping[str, str]) -> str:
    """Translates a weight's name by a table in which stars stand for numbers, either way round."""
    numbers = (part for part in name.split(".") if part.isdigit())
    return ".".join(next(numbers) if part == "*" else part for part in table[starred(name)].split("."))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values are weights as they stand: not integers, nor floats that want a scale beside them."""
    return tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Stored:
    """One tensor of a layout, and the weights of ours that are its rows.

    Attributes:
        parts: our names and shapes, in order.
        transposed: whether it is stored [in, out].
    """

    name: str
    parts: dict[str, tuple[int, ...]]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = list(self.parts.values())
        joined = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        return joined[::-1] if self.transposed else joined

    def indices(self, turns: int) -> dict[str, list[Index]]:
        """Our name -> the parts of the tensor that make it up."""
        if len(self.parts) == 1:
            return {name: [()] for name in self.parts}
        found: dict[str, list[Index]] = {name: [] for name in self.parts}
        start = 0
        for _ in range(turns):
            for name, (rows, *_) in self.parts.items():
                if rows % turns:
                    raise InputError(f"{self.name} cannot be {turns} turns of {rows} rows; give another checkpoint")
                piece = slice(start, start := start + rows // turns)
                found[name].append((slice(None), piece) if self.transposed else (piece,))
        return found


def match(
    path: Path, config: ModelConfig, sources: Mapping[str, TensorSource], storage: Storage, spare: Collection[str] = ()
) -> LazyWeights:
    """Finds every weight of the model among the sources.

    Args:
        path: the checkpoint, for messages.
        spare: names that may be there and are not weights of the model.

    Raises:
        InputError: a weight is missing, unknown or misshapen; lists the names.
    """
    wanted = _wanted(config, storage)
    if missing := wanted.keys() - sources.keys():
        raise InputError(f"{path} lacks the weights {listed(missing)}; its config is another's")
    if unknown := sources.keys() - wanted.keys() - set(spare):
        raise InputError(f"{path} holds weights that its architecture does not have: {listed(unknown)}; give another")
    if coded := [name for name in wanted if not sources[name].plain]:
        raise InputError(f"{path} holds {listed(coded)} quantised or as integers; give the unquantised checkpoint")
    for name, stored in wanted.items():
        if sources[name].shape != stored.shape:
            raise InputError(
                f"{name} in {path} is {list(sources[name].shape)} where its configuration asks for "
                f"{list(stored.shape)}; the two are not of one checkpoint"
            )
    return LazyWeights(
        {
            name: partial(_read, name, sources[stored.name], indices, stored.transposed, (config, storage))
            for stored in wanted.values()
            for name, indices in stored.indices(storage.turns).items()
        }
    )


def _wanted(config: ModelConfig, storage: Storage) -> dict[str, _Stored]:
    """The layout's name -> what is to be found under it."""
    order = {pattern: place for place, pattern in enumerate(storage.names)}
    wanted: dict[str, _Stored] = {}
    for name, shape in sorted(expected_shapes(config).items(), key=lambda item: order[starred(item[0])]):
        theirs = renamed(name, storage.names)
        transposed = storage.transposed and len(shape) == 2 and name.startswith("layers.")
        wanted.setdefault(theirs, _Stored(theirs, {}, transposed)).parts[name] = shape
    return wanted


def _read(
    name: str, source: TensorSource, indices: list[Index], transposed: bool, layout: tuple[ModelConfig, Storage]
) -> Tensor:
    """One weight of ours, as the model has it."""
    config, storage = layout
    pieces = [source.read(index) for index in indices]
    tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=int(transposed))
    if transposed:
        tensor = tensor.T.contiguous()
    if storage.norm_offset and name.endswith("norm.weight"):
        tensor = tensor.float() + storage.norm_offset
    return rotary_order(name, tensor, config) if storage.interleaved else tensor


def rotary_order(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """The weight with its rotary pairs half-split, where it is a wq or wk that has them interleaved."""
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
    return half_split(weight, heads, config.rotated) if heads else weight


def token_ids(value: Any, name: str, path: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids that a configuration gives under `name`: one, a list, or none.

    Raises:
        InputError: an id is no whole number within the vocabulary.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InputError(f"{path} sets {name} to {value!r}; ids are whole numbers from 0 to {vocab_size - 1}")
    return tuple(ids)


SAMPLING: dict[str, type] = {"temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}
"""What a checkpoint may recommend for choosing tokens, as `runtime.text.sampler.SamplingOptions` has it."""


def recommended(settings: Mapping[str, Any], path: Path) -> dict[str, float]:
    """What a generation_config.json recommends. Where it asks for the likeliest token, only the penalty.

    Raises:
        InputError: a value is no number.
    """
    found = {}
    for name, kind in SAMPLING.items():
        value = settings.get(name)
        if value is None or (settings.get("do_sample") is False and name != "repetition_penalty"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value or value < 0:
            raise InputError(f"{path} sets {name} to {value!r}, which is impossible; correct it or leave it out")
        found[name] = kind(value)
    return found


def read_head(path: Path, size: int) -> bytes:
    """A file's first bytes; fewer where it is shorter, and none where the path is no file."""
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        return stream.read(size)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors write a mark before it
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); give the checkpoint with a whole one") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} where an object belongs; give one that does")
    return content
