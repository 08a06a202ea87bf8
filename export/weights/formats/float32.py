"""Float32, the format of matrices that are not quantised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from export.weights.formats.format import Format, Share


@dataclass(frozen=True)
class Float32(Format):
    """The format of matrices that are not quantised."""

    kind: ClassVar[str] = "float32"
    bits: None = None
    group_size: None = None

    def __str__(self) -> str:
        return "float32"

    def nbytes(self, rows: int, columns: int) -> int:
        return rows * columns * 4

    def stored(self, weight: Tensor, rounding: str) -> Tensor:
        return weight.float()

    def random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape)

    def linear(self, stored: Tensor, bias: Tensor | None, width: int | None = None) -> nn.Module:
        layer = nn.Linear(stored.shape[1], stored.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(stored, requires_grad=False)
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return layer

    def embedding(self, stored: Tensor, columns: int) -> nn.Module:
        layer = nn.Embedding(stored.shape[0], stored.shape[1], device="meta")
        layer.weight = nn.Parameter(stored, requires_grad=False)
        return layer

    def parts(self, stored: Tensor) -> list[tuple[str, Tensor]]:
        return [("", stored.detach().contiguous())]

    def share(self, stored: Tensor, axis: int, take: Share) -> Tensor:
        return take(stored)


FLOAT = Float32()
