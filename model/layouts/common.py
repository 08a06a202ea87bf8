"""What every layout of checkpoint shares: the opened Checkpoint, lazy weights, and the matching of names."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
class Checkpoint:
    """A checkpoint that has been opened and checked, its weights still on storage.

    Attributes:
        config: the model's dimensions.
        weights: lazy state dict of `model.model.Llama`, in the file's own dtype.
        files: what the content consists of, for `digest`.
        layout: the layout's name.
        bos_id: the id that starts a text, where the checkpoint says so.
        stop_ids: the ids that end a text, where the checkpoint says so.
        tokenizer: the tokenizer file that belongs to the layout, where there is one.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    files: tuple[Path, ...]
    layout: str
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    tokenizer: Path | None = None

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


def half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Reorders the rows of wq or wk, [n*Dh, D], from interleaved rotary pairs (2i, 2i+1) to (i, i + Dh/2)."""
    rows, dim = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


@dataclass(frozen=True)
class Source:
    """A tensor on storage: its shape, whether it holds floats of a plain format, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    plain: bool = True


def renamed(name: str, table: Mapping[str, str]) -> str:
    """Translates a weight's name by a table in which a star stands for the layer's number, either way round."""
    parts = name.split(".")
    layer = next((part for part in parts if part.isdigit()), "")
    pattern = ".".join("*" if part.isdigit() else part for part in parts)
    return table[pattern].replace("*", layer)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values are weights as they stand: not integers, nor floats that want a scale beside them."""
    return tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def match(
    path: Path, config: ModelConfig, sources: Mapping[str, Source], table: Mapping[str, str], spare: set[str]
) -> dict[str, Source]:
    """Finds every weight of the model among the sources: our name -> source.

    Args:
        path: the checkpoint, for messages.
        table: our names -> the layout's, starred.
        spare: names that may be there and are not weights of the model.

    Raises:
        InputError: a weight is missing, unknown or misshapen; lists the names.
    """
    shapes = expected_shapes(config)
    wanted = {renamed(name, table): name for name in shapes}
    if missing := wanted.keys() - sources.keys():
        raise InputError(f"{path} lacks the weights {listed(missing)}; download the checkpoint again")
    if unknown := sources.keys() - wanted.keys() - spare:
        raise InputError(f"{path} holds weights that no plain Llama has: {listed(unknown)}; give another model")
    if coded := [theirs for theirs in wanted if not sources[theirs].plain]:
        raise InputError(f"{path} holds {listed(coded)} quantised or as integers; give the unquantised checkpoint")
    for theirs, ours in wanted.items():
        if sources[theirs].shape != shapes[ours]:
            raise InputError(
                f"{theirs} in {path} is {list(sources[theirs].shape)} where its configuration asks for "
                f"{list(shapes[ours])}; the two are not of one checkpoint"
            )
    return {ours: sources[theirs] for theirs, ours in wanted.items()}


def half_split_readers(weights: Mapping[str, Source], config: ModelConfig) -> dict[str, Callable[[], Tensor]]:
    """Readers of weights whose rotary pairs are stored interleaved: wq and wk are reordered as they are read."""
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}

    def reader(source: Source, n_heads: int) -> Callable[[], Tensor]:
        return lambda: half_split(source.read(), n_heads)

    return {
        name: reader(source, heads[kind]) if (kind := name.split(".")[-2]) in heads else source.read
        for name, source in weights.items()
    }


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


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); download the checkpoint again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} where an object belongs; download it again")
    return content
