"""The activations of feed-forward networks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu_tanh(x: Tensor) -> Tensor:
    """Computes GELU with the tanh approximation (https://arxiv.org/abs/1606.08415, section 2).

    The formula is written out because backends replace F.gelu(approximate="tanh") by the exact GELU.
    """
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))  # sqrt(2 / pi)


def relu_squared(x: Tensor) -> Tensor:
    """Computes relu(x)^2 (https://arxiv.org/abs/2109.08668, section 4)."""
    positive = F.relu(x)
    return positive * positive


class XIELU(nn.Module):
    """The activation x/2 + p * x^2 for positive x and x/2 + n * (e^x - 1 - x) for others (https://arxiv.org/abs/2411.13010,
    section 3.2), with a learned p and n for each block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Parameter(torch.ones(1))
        self.negative = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps every number of the tensor."""
        above, below = F.relu(x), -F.relu(-x)
        return 0.5 * x + self.positive * (above * above) + self.negative * (torch.exp(below) - 1.0 - below)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu_squared": relu_squared,
}
"""Maps names of activations without weights to their functions."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Returns the activation with a name in ModelConfig, a module if it has weights."""
    return XIELU() if name == "xielu" else ACTIVATIONS[name]
