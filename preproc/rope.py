"""Tables of the rotary cos and sin, computed outside the graph, which receives only the rows of its positions."""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.rotary import attention_factor, inverse_frequencies
from model.rotary import rope as apply


def tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of the angles of every position, multiplied by the attention factor, [length, P] float32
    each. If local blocks have frequencies of their own, theirs follow without the factor, [length, 2P].
    """
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config, length))
    factor = torch.ones(angles.shape[1])
    factor[: config.rotated // 2] = attention_factor(config.rope_scaling)
    return angles.cos() * factor, angles.sin() * factor


def earlier(keys: Tensor, tables: tuple[Tensor, Tensor], distance: int) -> Tensor:
    """Rotates keys [..., Dh], already rotated for their positions, to positions `distance` earlier. This is possible
    because angles are proportional to the position.

    Args:
        tables: cos and sin of every position for the block's pairs, multiplied by the attention factor. The factor is
            removed here, because the keys already include it.
    """
    cos, sin = (table[distance] / tables[0][0] for table in tables)
    return apply(keys, cos, -sin)


def slices(tables: tuple[Tensor, Tensor], position: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns the rows of cos and sin for `length` tokens that start at `position`, [1, length, P] each.

    Rows beyond the table repeat its last row. They belong to padding, whose results are not used.
    """
    rows = torch.arange(position, position + length).clamp(max=len(tables[0]) - 1)
    return tables[0][rows].unsqueeze(0), tables[1][rows].unsqueeze(0)
