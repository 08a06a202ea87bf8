"""Attention masks, worked out before the graph: added to the scores, 0 or a bias where visible."""

import numpy as np
import torch
from torch import Tensor

HIDDEN = -1e9
"""Added to a hidden score. Finite, so that no row can turn into NaN, and far below any real score."""


def causal(position: int, length: int, capacity: int, window: int | None = None) -> Tensor:
    """Mask of `length` new tokens that start at `position`: [length, capacity + length] float32.

    The first `capacity` columns are the cache's slots, the last `length` the new rows themselves, each of which sees
    the ones up to itself.

    Args:
        window: how many positions a token sees, itself included; None for all.

    Raises:
        ValueError: the position is negative, or the cache does not hold all that the first new token sees.
    """
    window = position + length if window is None else window
    if position < 0 or capacity < min(position, window - 1):
        raise ValueError(f"position {position} is outside the cache's capacity of {capacity}")
    distances = _distances(position, length, capacity)
    return torch.where((distances >= 0) & (distances < window), 0.0, HIDDEN)


def alibi(position: int, length: int, capacity: int, slopes: Tensor, window: int | None = None) -> Tensor:
    """A causal mask that weighs distance, one per head: [H, length, capacity + length] float32.

    Each head adds -slope for every position that lies between (ALiBi, https://arxiv.org/abs/2108.12409, section 3).

    Args:
        slopes: [H], see `alibi_slopes`.
        window: as in `causal`.
    """
    mask = causal(position, length, capacity, window)
    return mask - slopes.view(-1, 1, 1) * (mask == 0) * _distances(position, length, capacity)


def held(position: int, capacity: int) -> Tensor:
    """[capacity] int64: which position each slot of a cache holds before `position` is written; -1 for none.

    A position p lies in slot p % capacity, so a cache shorter than the text is a ring of its latest rows.
    """
    slots = torch.arange(capacity)
    return position - 1 - (position - 1 - slots) % capacity if position else torch.full((capacity,), -1)


def _distances(position: int, length: int, capacity: int) -> Tensor:
    """[length, capacity + length] int64: how far each column lies before each new token; negative where it follows it
    or holds nothing yet.
    """
    new, cached = torch.arange(position, position + length), held(position, capacity)
    cached = torch.where(cached < 0, position + length, cached)
    return new[:, None] - torch.cat((cached, new))


class CausalMask:
    """One mask, allocated once and moved from step to step; its values are those of `causal`, or of `alibi`.

    Attributes:
        values: [1 or H, length, capacity + length] float32.
    """

    def __init__(self, length: int, capacity: int, window: int | None = None, slopes: Tensor | None = None) -> None:
        """Lays it out for position 0.

        Args:
            window: as in `causal`.
            slopes: [H], of a mask that weighs distance; None or empty for one that does not.
        """
        self._plain = window is None and not (slopes is not None and len(slopes))
        slopes = torch.zeros(1) if slopes is None or not len(slopes) else slopes
        self.values = alibi(0, length, capacity, slopes, window)
        self._cached = self.values.numpy()[..., :capacity]  # slices of which cost a tenth of a tensor's
        self._position = 0
        # Row i sees the cache's rows at distances capacity + i ... 1 + i: a stretch of one line of biases.
        line = alibi(capacity + length - 1, 1, capacity + length - 1, slopes, window)[:, 0].numpy()
        self._ordered = np.lib.stride_tricks.sliding_window_view(line, max(capacity, 1), axis=1)[:, length - 1 :: -1]

    def move(self, position: int) -> None:
        """Makes it the mask of tokens that start at `position`. Of a plain one only what changed is written."""
        before, self._position = self._position, position
        capacity = self._cached.shape[2]
        if position == before or not capacity:
            return
        if self._plain:
            self._cached[..., min(before, position) : max(before, position)] = 0 if position > before else HIDDEN
            return
        newer = position % capacity if position >= capacity else position  # slots from 0 that hold the latest rows
        self._cached[..., :newer] = self._ordered[..., capacity - newer :]
        self._cached[..., newer:] = self._ordered[..., : capacity - newer] if position >= capacity else HIDDEN
