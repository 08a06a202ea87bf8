"""Processing of a large matrix a part of its rows at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 1 << 18
"""Number of elements of a part, few enough to stay in the processor's caches."""


def by_rows(matrix: Tensor, make: Callable[[Tensor], Sequence[Tensor]], at_once: int | None = None) -> list[Tensor]:
    """Applies `make` to a matrix, a part of its rows at a time, and joins the resulting tensors along the rows.

    Args:
        make: returns tensors with one row for each row of its argument.
        at_once: number of elements of a part; None for a small default.
    """
    whole, start = list[Tensor](), 0
    for rows in torch.split(matrix, max(1, at_once // matrix.shape[1])) if at_once else row_chunks(matrix):
        made = make(rows)
        whole = whole or [torch.empty((len(matrix), *part.shape[1:]), dtype=part.dtype) for part in made]
        for target, part in zip(whole, made, strict=True):
            target[start : start + len(rows)] = part
        start += len(rows)
    return whole


def row_chunks(matrix: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
    """Yields a matrix in parts of whole rows, each small compared with a large model's matrices. With `like`, the parts
    have the same numbers of rows as those of `like`.
    """
    columns = (matrix if like is None else like).shape[1]
    yield from torch.split(matrix, max(1, _ELEMENTS_AT_ONCE // columns))
