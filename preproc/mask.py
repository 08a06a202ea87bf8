"""Attention masks, worked out before the graph: added to the scores, 0 or a bias where visible."""

import torch
from torch import Tensor

from model.config import ModelConfig

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


def alibi(position: int, length: int, capacity: int, slopes: Tensor) -> Tensor:
    """A causal mask that weighs distance, one per head: [H, length, capacity + length] float32.

    Each head adds -slope for every position that lies between (ALiBi, https://arxiv.org/abs/2108.12409, section 3).

    Args:
        slopes: [H], see `alibi_slopes`.
    """
    distances = _distances(position, length, capacity)
    return causal(position, length, capacity) - slopes.view(-1, 1, 1) * distances.clamp(min=0)


def alibi_slopes(config: ModelConfig) -> Tensor:
    """[H] float32: 2^(-max_bias * i / n) for i = 1 ... n, n being H rounded up to a power of two; where H is none, the
    odd-numbered ones come first (as in MPT: mosaicml/llm-foundry, llmfoundry/models/layers/attention.py, gen_slopes).
    """
    n = 1 << (config.n_heads - 1).bit_length()
    slopes = 2.0 ** (-config.alibi_max_bias * torch.arange(1, n + 1, dtype=torch.float32) / n)
    return slopes if n == config.n_heads else torch.cat((slopes[1::2], slopes[::2]))[: config.n_heads]


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
