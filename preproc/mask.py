"""Attention masks, worked out before the graph: added to the scores, 0 where visible."""

import torch
from torch import Tensor

HIDDEN = -1e9
"""Added to a hidden score. Finite, so that no row can turn into NaN, and far below any real score."""


def causal(position: int, length: int, capacity: int) -> Tensor:
    """Mask of `length` new tokens that start at `position`: [length, capacity + length] float32.

    The first `capacity` columns are the cache's slots, of which those before `position` hold something; the last
    `length` are the new rows themselves, each of which sees the ones up to itself.

    Raises:
        ValueError: position outside [0, capacity].
    """
    if not 0 <= position <= capacity:
        raise ValueError(f"position {position} is outside the cache's capacity of {capacity}")
    mask = torch.full((length, capacity + length), HIDDEN)
    mask[:, :position] = 0
    mask[:, capacity:] = torch.triu(torch.full((length, length), HIDDEN), diagonal=1)
    return mask
