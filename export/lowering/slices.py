"""Slices for tensor parallelism: the dimensions, methods and weights of each slice of a model."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.lowering.trace import GraphOptions, signatures
from export.weights.scheme import Scheme, matrices
from export.weights.source import WeightSource
from model.config import ModelConfig
from model.errors import InputError
from model.tensor_parallel import BY_COLUMNS, BY_ROWS, SlicedLlama, ceil_share
from preproc.position_inputs import names
from runtime.pte.metadata import CACHES, ROWS, STREAM, MethodSpec, TensorSpec, of_layer

_UNABLE: dict[str, Callable[[ModelConfig], bool]] = {
    "norms behind attention and feed-forward (post_norms)": lambda config: config.post_norms,
    "parallel blocks": lambda config: config.parallel,
    "a mixture of experts": lambda config: config.n_experts > 0,
    "queries and keys normalised in another way than by one weight per head": lambda config: (
        config.qk_norm and config.qk_norm_over != "head"
    ),
    "normalised embeddings": lambda config: config.embedding_norm,
    "ALiBi": lambda config: config.positions == "alibi",
}
"""Features that cannot be sliced: the halves of a block are then not sums over heads and hidden units, or it is not
implemented.
"""


def sliced(config: ModelConfig, count: int) -> ModelConfig:
    """Returns the dimensions of one slice of `count`, which are the same for all slices.

    Parts of the last slices beyond the model's dimensions are filled with zeros. If heads in several slices share a KV
    head, each of these slices has a copy of it.

    Raises:
        InputError: the model cannot be divided into this many slices.
    """
    if count == 1:
        return config
    flag = f"--tensor-parallel {count}"
    for words, has in _UNABLE.items():
        if has(config):
            raise InputError(f"{flag} is unsupported for a model with {words}; leave it out")
    if count > config.n_heads:
        raise InputError(f"{flag} is more than the model's {config.n_heads} heads; give at most that")
    return dataclasses.replace(
        config,
        n_heads=ceil_share(config.n_heads, count),
        n_kv_heads=len(kv_heads(config, 0, count)),
        hidden_dim=ceil_share(config.hidden_dim, count),
        vocab_size=ceil_share(config.vocab_size, count),
    )


def kv_heads(config: ModelConfig, number: int, count: int) -> list[int]:
    """Returns the KV heads of slice `number`, one per run of query heads that share a KV head.

    All slices use runs of the same length, the greatest one that works for every slice. Padding heads beyond the
    model's have KV heads beyond the model's; a run never mixes the two.
    """
    heads, group = ceil_share(config.n_heads, count), config.n_heads // config.n_kv_heads
    first = number * heads
    return [head // group for head in range(first, first + heads, math.gcd(heads, group))]


def check_groups(config: ModelConfig, scheme: Scheme, count: int) -> None:
    """Checks that each slice has whole groups of weights that share a scale, for matrices that are stored in such
    groups.

    Raises:
        InputError: a slice would have incomplete groups, or whole groups although the rows of the whole matrix are not
            whole groups.
    """
    whole = matrices(config)
    for name, (_, columns) in matrices(sliced(config, count)).items():
        form, of_slice = (scheme.format(name, each) for each in (whole[name][1], columns))
        if form.group_size and not form.fits(columns):
            raise InputError(
                f"--tensor-parallel {count} leaves {columns} columns of {name}, which is not a multiple of the group "
                f"size {form.group_size}; give a --group-size that divides them, --quantize 8da8w, or fewer slices"
            )
        if form != of_slice:
            raise InputError(
                f"--tensor-parallel {count} leaves {columns} columns of {name}, which is a multiple of the group size "
                f"{of_slice.group_size}, but the model's {whole[name][1]} columns are not; give another --group-size, "
                "--quantize 8da8w, or another number of slices"
            )


def slices(config: ModelConfig, options: GraphOptions, kv_dtype: str, count: int) -> tuple[tuple[MethodSpec, ...], ...]:
    """Returns the methods of each slice, in the order in which they run: `forward.embed`, `forward.attend.0`,
    `forward.feed.0`, ..., `forward.head`; see `model.tensor_parallel`. Each method but the last returns a part of a
    sum.
    """
    part = sliced(config, count)
    (whole,) = signatures(part, options, kv_dtype)
    return tuple(
        tuple(dataclasses.replace(half, slice=number, slices=count) for half in _halves(part, whole))
        for number in range(count)
    )


def _halves(config: ModelConfig, whole: MethodSpec) -> Iterator[MethodSpec]:
    """Yields the methods of a slice, which are halves of blocks, from the method of the whole slice."""
    found = {spec.name: spec for spec in (*whole.inputs, *whole.outputs)}
    found[STREAM] = TensorSpec(STREAM, (*found["tokens"].shape, config.dim), "float32")

    def half(name: str, layers: range, taken: Sequence[str], given: Sequence[str]) -> MethodSpec:
        inputs, outputs = (tuple(found[each] for each in roles if each in found) for roles in (taken, given))
        ends = {"start_layer": layers.start, "end_layer": layers.stop}
        return dataclasses.replace(whole, name=f"{whole.name}.{name}", inputs=inputs, outputs=outputs, **ends)

    yield half("embed", range(0), ["tokens", "positions"], [STREAM])
    for layer in range(config.n_layers):
        span = range(layer, layer + 1)
        elsewhere = {"positions"} | ({"cos", "sin"} if layer in config.nope_layers else set())
        positions = [name for name in names(config, fused=True, span=span) if name not in elsewhere]
        caches, rows = ([of_layer(role, layer) for role in roles] for roles in (CACHES, ROWS))
        yield half(f"attend.{layer}", span, [STREAM, *positions, *caches], [STREAM, *rows])
        yield half(f"feed.{layer}", span, [STREAM], [STREAM])
    yield half("head", range(config.n_layers, config.n_layers), [STREAM, "select"], ["logits", "hidden"])


class SlicedSource(WeightSource):
    """The weights of one slice, as a view of the whole model's weights. Matrices are quantised whole and then divided,
    so that the slices have the same quantised weights as the whole model.
    """

    def __init__(self, whole: WeightSource, number: int, count: int) -> None:
        """Takes the source of the whole model, the number of this slice, and the count of slices."""
        super().__init__(sliced(whole.config, count), {}, whole.scheme)
        self._whole = whole
        self._number = number
        self._count = count

    def weight(self, name: str) -> Tensor:
        """Returns the slice's share of a parameter: its rows or columns, the whole parameter, or zeros if only slice 0
        adds it.
        """
        found = self._whole.weight(name)
        axis, of_first = _axis(name), name.endswith((".wo.bias", ".w2.bias", "pos_embeddings.weight"))
        if of_first and self._number > 0:
            return torch.zeros_like(found)
        return found if axis is None else self._share(found, name=name, axis=axis)

    def stored(self, name: str) -> Tensor:
        """Returns the slice's share of a parameter in its format."""
        if name not in self.matrices:
            return super().stored(name)
        found, axis = self._whole.stored(name), _axis(name)
        assert axis is not None, f"{name} is not divided"
        return self._whole.format(name).share(found, axis, functools.partial(self._share, name=name, axis=axis))

    def _share(self, whole: Tensor, padding: float = 0.0, *, name: str, axis: int) -> Tensor:
        """Returns the slice's rows or columns, in whole heads; of KV heads, those used by the slice's query heads."""
        config, role = self._whole.config, name.split(".")[-2]
        if role in ("wk", "wv"):
            heads = kv_heads(config, self._number, self._count)
            each = whole.reshape(config.n_kv_heads, -1, *whole.shape[1:])
            return _reaching(each, 0, max(heads) + 1, padding)[heads].flatten(0, 1)
        units = config.n_heads if role in ("wq", "wo") else whole.shape[axis]
        size = ceil_share(units, self._count) * whole.shape[axis] // units
        start = min(self._number * size, whole.shape[axis])
        found = whole.narrow(axis, start, min(size, whole.shape[axis] - start))
        return _reaching(found, axis, size, padding)

    def sliced(self, made: Mapping[str, nn.Module]) -> SlicedLlama:
        """Builds the slice from its modules: embeddings, and either blocks and head, or lowered pieces as named by
        `export.lowering.trace.half_pieces`.
        """
        pieces = {name for name in made if name.startswith(("attend.", "feed."))}
        model = SlicedLlama(self.model({name: made[name] for name in made.keys() - pieces}), self._number)
        for name in pieces:
            model.set_submodule(name, made[name])
        return model.eval()


def _reaching(found: Tensor, axis: int, size: int, padding: float) -> Tensor:
    """Returns the tensor, padded at the end of an axis with `padding` if it has fewer than `size` elements there."""
    lacking = max(size - found.shape[axis], 0)
    return F.pad(found, [0, 0] * (found.dim() - 1 - axis) + [0, lacking], value=padding) if lacking else found


def _axis(name: str) -> int | None:
    """Returns the axis along which a parameter is divided: 0 for rows, 1 for columns; None if it is not divided."""
    role, kind = name.split(".")[-2:]
    if role in BY_ROWS:
        return 0
    return 1 if role in BY_COLUMNS and kind == "weight" else None
