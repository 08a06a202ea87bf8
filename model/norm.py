"""Normalisation of the residual stream, and of queries and keys."""

import torch
from torch import Tensor, nn

from model.config import ModelConfig


class Norm(nn.Module):
    """RMSNorm, x / rms(x) * weight (https://arxiv.org/abs/1910.07467, eq. 4), or LayerNorm, which subtracts the mean
    first (https://arxiv.org/abs/1607.06450, eq. 4) and may add a bias.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.centred = config.norm == "layer"
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.bias = nn.Parameter(torch.zeros(config.dim)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of [B, L, D], or of each head in [B, L, H, Dh]."""
        if self.centred:
            x = x - last_mean(x)
        x = x * torch.rsqrt(last_mean(x * x) + self.eps) * self.weight
        return x if self.bias is None else x + self.bias


class QKNorm(Norm):
    """The norm of the queries or keys of all heads, without a bias.

    It normalises each head, with one weight for all heads [Dh] or a weight for each [H, Dh], or all heads together
    with a weight [H*Dh], as `ModelConfig.qk_norm_over` says.
    """

    def __init__(self, config: ModelConfig, n_heads: int) -> None:
        super().__init__(config)
        self.width = config.head_dim * (n_heads if config.qk_norm_over == "projection" else 1)
        shape = (n_heads, config.head_dim) if config.qk_norm_over == "own_head" else (self.width,)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [B, L, H*Dh]."""
        heads = x.view(x.shape[0], -1, x.shape[2] // self.width, self.width)
        return super().forward(heads).view(x.shape[0], -1, x.shape[2])


def last_mean(x: Tensor) -> Tensor:
    """Returns the mean over the last dimension, [..., D] -> [..., 1].

    The mean runs over two dimensions of a 4-D view, because only in this form do all backends delegate it whole.
    """
    return x.reshape(1, -1, 1, x.shape[-1]).mean((2, 3), keepdim=True).view(x.shape[0], -1, *x.shape[2:-1], 1)
