"""RoPE tables, worked out before the graph: the graph only multiplies by the slice it is given."""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.rotary import attention_factor, inverse_frequencies
from model.rotary import rope as apply


def tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, times the attention factor: [length, P] float32 each."""
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config, length))
    factor = attention_factor(config.rope_scaling)
    return angles.cos() * factor, angles.sin() * factor


def earlier(keys: Tensor, tables: tuple[Tensor, Tensor], distance: int) -> Tensor:
    """Rotated keys [..., Dh] as they would be `distance` positions earlier: angles grow in proportion to the position.

    Args:
        tables: cos and sin of every position, times one factor, which the keys already have.
    """
    cos, sin = (table[distance] / tables[0][0] for table in tables)
    return apply(keys, cos, -sin)


def slices(tables: tuple[Tensor, Tensor], position: int, length: int) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin for `length` tokens that start at `position`: [1, length, P] each.

    Rows past the table belong to padding, whose results nobody reads; they repeat the last one.
    """
    rows = torch.arange(position, position + length).clamp(max=len(tables[0]) - 1)
    return tables[0][rows].unsqueeze(0), tables[1][rows].unsqueeze(0)
