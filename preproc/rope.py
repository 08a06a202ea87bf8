"""RoPE tables, worked out before the graph: the graph only multiplies by the slice it is given."""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, length: int) -> Tensor:
    """[P] float32: theta^(-i/P) for pair i (RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.2), scaled.

    float32 throughout, as in training: at long positions a more exact angle is a different angle.

    Args:
        length: positions that a text may have; some kinds of scaling depend on it.
    """
    exponents = torch.arange(0, config.rotated, 2, dtype=torch.float32) / config.rotated
    frequencies = 1.0 / config.rope_theta**exponents
    return scaled(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's scaling (meta-llama/llama-models, models/llama3/model.py, apply_scaling).

    Wavelengths under original_context / high_freq_factor are kept, those over original_context / low_freq_factor are
    stretched by the factor, and the ones between are blended linearly in original_context / wavelength.
    """
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles: [length, P] float32 each."""
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config, length))
    return angles.cos(), angles.sin()


def slices(tables: tuple[Tensor, Tensor], position: int, length: int) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin for `length` tokens that start at `position`: [1, length, P] each.

    Rows past the table belong to padding, whose results nobody reads; they repeat the last one.
    """
    rows = torch.arange(position, position + length).clamp(max=len(tables[0]) - 1)
    return tables[0][rows].unsqueeze(0), tables[1][rows].unsqueeze(0)
