"""ALiBi slopes: the bias of each head per position of distance."""

import torch
from torch import Tensor

from model.config import ModelConfig


def alibi_slopes(config: ModelConfig) -> Tensor:
    """Returns the slopes [H] float32: 2^(-max_bias * i / n) for i = 1 ... n, where n is H rounded up to a power of two.

    If H is not a power of two, the slopes of even i come first and the list is cut to H entries (as in MPT:
    mosaicml/llm-foundry, llmfoundry/models/layers/attention.py, gen_slopes).
    """
    n = 1 << (config.n_heads - 1).bit_length()
    slopes = 2.0 ** (-config.alibi_max_bias * torch.arange(1, n + 1, dtype=torch.float32) / n)
    return slopes if n == config.n_heads else torch.cat((slopes[1::2], slopes[::2]))[: config.n_heads]
