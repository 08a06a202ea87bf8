"""Attention masks, computed outside the graph and added to the scores: 0 or a bias for visible positions, HIDDEN for
others.
"""

import numpy as np
import torch
from torch import Tensor

HIDDEN = -1e9
"""Value added to the score of a hidden position. It is finite, so that no row becomes NaN, and far below any real
score.
"""


def causal(position: int, length: int, capacity: int, window: int | None = None) -> Tensor:
    """Returns the mask of `length` new tokens that start at `position`, [length, capacity + length] float32.

    The first `capacity` columns are the slots of the cache. The last `length` columns are the new tokens; each one
    attends to itself and to the new tokens before it.

    Args:
        window: number of positions that a token attends to, including its own; None for all.

    Raises:
        ValueError: the position is negative, or the cache is too small for all positions that the first new token
            attends to.
    """
    window = position + length if window is None else window
    if position < 0 or capacity < min(position, window - 1):
        raise ValueError(f"position {position} is outside the cache's capacity of {capacity}")
    distances = _distances(position, length, capacity)
    return torch.where((distances >= 0) & (distances < window), 0.0, HIDDEN)


def alibi(position: int, length: int, capacity: int, slopes: Tensor, window: int | None = None) -> Tensor:
    """Returns a causal mask with a distance bias for each head, [H, length, capacity + length] float32.

    The bias is -slope times the distance between the two positions (ALiBi, https://arxiv.org/abs/2108.12409, section
    3).

    Args:
        slopes: [H], see `alibi_slopes`.
        window: as in `causal`.
    """
    mask = causal(position, length, capacity, window)
    return mask - slopes.view(-1, 1, 1) * (mask == 0) * _distances(position, length, capacity)


def held(position: int, capacity: int) -> Tensor:
    """Returns the position held by each slot of a cache before `position` is written, [capacity] int64; -1 for an empty
    slot.

    Position p is stored in slot p % capacity, so a cache shorter than the text is a ring of the latest rows.
    """
    slots = torch.arange(capacity)
    return position - 1 - (position - 1 - slots) % capacity if position else torch.full((capacity,), -1)


def _distances(position: int, length: int, capacity: int) -> Tensor:
    """Returns the distance from each column back from each new token, [length, capacity + length] int64. It is negative
    for positions after the token and for empty slots.
    """
    new, cached = torch.arange(position, position + length), held(position, capacity)
    cached = torch.where(cached < 0, position + length, cached)
    return new[:, None] - torch.cat((cached, new))


class CausalMask:
    """A mask that is allocated once and updated at each step. Its values are those of `causal` or `alibi`.

    Attributes:
        values: [1 or H, length, capacity + length] float32.
    """

    def __init__(self, length: int, capacity: int, window: int | None = None, slopes: Tensor | None = None) -> None:
        """Allocates the mask for position 0.

        Args:
            window: as in `causal`.
            slopes: [H], for a mask with a distance bias; None or empty for one without.
        """
        self._plain = window is None and not (slopes is not None and len(slopes))
        slopes = torch.zeros(1) if slopes is None or not len(slopes) else slopes
        self.values = alibi(0, length, capacity, slopes, window)
        self._cached = self.values.numpy()[..., :capacity]  # an array's slices cost a tenth of a tensor's
        self._position = 0
        # Row i attends to the cached rows at distances capacity + i ... 1 + i, a contiguous part of one line of biases.
        line = alibi(capacity + length - 1, 1, capacity + length - 1, slopes, window)[:, 0].numpy()
        self._ordered = np.lib.stride_tricks.sliding_window_view(line, max(capacity, 1), axis=1)[:, length - 1 :: -1]

    def move(self, position: int) -> None:
        """Updates the mask for tokens that start at `position`. Without window and slopes, only the changed columns are
        written.
        """
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
