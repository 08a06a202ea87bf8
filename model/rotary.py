"""Rotary position embedding: the rotation, its frequencies, and their scaling for longer contexts."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling

Angles = tuple[Tensor, Tensor]
"""The tensors cos and sin, see `rope`."""


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + P) of each head by the angle of its position (RoFormer,
    https://arxiv.org/abs/2104.09864).

    Args:
        x: [..., L, Dh], in the half-split order of Hugging Face checkpoints. Values after the first 2P are left
            unchanged.
        cos, sin: [..., L, P], from `preproc.rope`.
    """
    P = cos.shape[-1]
    a, b = x[..., :P], x[..., P : 2 * P]
    parts = [a * cos - b * sin, b * cos + a * sin]
    rest = [x[..., 2 * P :]] if x.shape[-1] > 2 * P else []
    return torch.cat(parts + rest, dim=-1)


def block_angles(angles: Angles | None, first: int | None, count: int) -> Angles | None:
    """Returns the cos and sin of a block's `count` rotary pairs, which begin at column `first`, [..., L, count] each.
    None for a block without rotary embedding.
    """
    if angles is None or first is None:
        return None
    cos, sin = angles
    if cos.shape[-1] == count:
        return angles
    return cos[..., first : first + count], sin[..., first : first + count]


def inverse_frequencies(config: ModelConfig, length: int) -> Tensor:
    """Returns the rotary frequencies [P] float32: theta^(-i/P) for pair i (RoFormer, https://arxiv.org/abs/2104.09864,
    section 3.2.2), with the model's scaling applied. If local blocks have frequencies of their own, these follow, [2P].

    All arithmetic is in float32, as in training: at long positions, higher precision would give different angles.

    Args:
        length: maximum number of positions in a text; dynamic and longrope scaling depend on it.
    """
    found = 1.0 / _powers(config, config.rope_theta)
    if config.rope_scaling:
        found = _SCALED[config.rope_scaling.kind](config, config.rope_scaling, length)
    if config.local_rope_theta is None:
        return found
    return torch.cat((found, 1.0 / _powers(config, config.local_rope_theta)))


def _powers(config: ModelConfig, theta: float) -> Tensor:
    """Returns theta^(i/P) for each pair i, [P]: the wavelength divided by 2 pi."""
    return theta ** (torch.arange(0, config.rotated, 2, dtype=torch.float32) / config.rotated)


def llama3_scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Applies Llama 3.1's scaling (meta-llama/llama-models, models/llama3/model.py, apply_scaling).

    Wavelengths below original_context / high_freq_factor are kept. Wavelengths above original_context / low_freq_factor
    are stretched by the factor. Between these limits, the two are blended linearly in original_context / wavelength.
    """
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _llama3(config: ModelConfig, scaling: RopeScaling, length: int) -> Tensor:
    return llama3_scaled(1.0 / _powers(config, config.rope_theta), scaling)


def _linear(config: ModelConfig, scaling: RopeScaling, length: int) -> Tensor:
    """Applies position interpolation, which stretches all wavelengths alike (https://arxiv.org/abs/2306.15595,
    eq. 4).
    """
    return 1.0 / _powers(config, config.rope_theta) / scaling.factor


def _dynamic(config: ModelConfig, scaling: RopeScaling, length: int) -> Tensor:
    """Applies dynamic NTK-aware scaling, whose base grows with the length of the text beyond the original context
    (https://arxiv.org/abs/2309.00071, section 3.1 and appendix A.1).
    """
    longer = scaling.factor * max(length, scaling.original_context) / scaling.original_context - (scaling.factor - 1)
    return 1.0 / _powers(config, config.rope_theta * longer ** (config.rotated / (config.rotated - 2)))


def _yarn(config: ModelConfig, scaling: RopeScaling, length: int) -> Tensor:
    """Applies YaRN (https://arxiv.org/abs/2309.00071, section 3.2).

    Pairs that turn beta_fast times or more within the original context are kept, those that turn beta_slow times or
    less are stretched, and a linear ramp blends the pairs between.
    """

    def pair(turns: float) -> float:
        radians = scaling.original_context / (turns * 2 * math.pi)
        return config.rotated * math.log(radians) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotated - 1)
    ramp = (torch.arange(config.rotated // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    stretched = ramp.clamp(0, 1)
    powers = _powers(config, config.rope_theta)
    return stretched / (scaling.factor * powers) + (1 - stretched) / powers


def _longrope(config: ModelConfig, scaling: RopeScaling, length: int) -> Tensor:
    """Applies LongRoPE, which divides each pair's frequency by a factor of its own; there is one set of factors for
    texts up to the original context and one for longer texts (https://arxiv.org/abs/2402.13753, section 3.2).
    """
    factors = scaling.long_factors if length > scaling.original_context else scaling.short_factors
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _powers(config, config.rope_theta))


_SCALED: dict[str, Callable[[ModelConfig, RopeScaling, int], Tensor]] = {
    "llama3": _llama3,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
}


def attention_factor(scaling: RopeScaling | None) -> float:
    """Returns the factor of cos and sin, which sharpens the attention of stretched positions (YaRN, section 3.4;
    LongRoPE as in microsoft/Phi-3-mini-128k-instruct, modeling_phi3.py, Phi3LongRoPEScaledRotaryEmbedding).
    """
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_context))
