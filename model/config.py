"""ModelConfig: every dimension of a model, once, validated."""

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`): long wavelengths are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        numbers_fit = 1 <= self.factor < math.inf and 0 < self.low_freq_factor < self.high_freq_factor < math.inf
        if not numbers_fit or self.original_context < 1:
            raise ValueError(
                f"rope scaling {dataclasses.asdict(self)} is impossible: it needs factor >= 1, original_context >= 1 "
                "and 0 < low_freq_factor < high_freq_factor"
            )


_LARGEST = {
    "dim": 1 << 17,
    "n_layers": 1 << 10,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "hidden_dim": 1 << 20,
    "vocab_size": 1 << 22,
    "context": 1 << 26,
}
"""Far beyond any model; a larger number is damage, and would only be noticed when memory runs out."""


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of one Llama checkpoint.

    Attributes:
        dim: width of the residual stream (D).
        n_layers: number of blocks.
        n_heads: query heads (H).
        n_kv_heads: key and value heads (K); divides n_heads.
        head_dim: width of one head (Dh), even; not always dim / n_heads.
        hidden_dim: width of the feed-forward (F).
        vocab_size: rows of the embedding (V).
        context: positions the checkpoint was trained for.
        norm_eps: added to the mean square in RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3.1's scaling, or None.
        tied: whether embedding and output head are one matrix.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value!r}: it must be a whole number from 1 to {most}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")
        if not 0 < self.norm_eps < math.inf or not 0 < self.rope_theta < math.inf:
            raise ValueError(f"norm_eps {self.norm_eps} and rope_theta {self.rope_theta} must be positive numbers")
        if type(self.tied) is not bool:
            raise ValueError(f"tied is {self.tied!r}: it must be true or false")
