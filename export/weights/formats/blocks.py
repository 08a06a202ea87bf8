"""Blocks, the formats of GGUF's types and of the OCP's microscaling, which this project's own operators run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from export.weights.formats.block_rounding import Scales, blocks_of, fitted, packed
from export.weights.formats.float32 import FLOAT
from export.weights.formats.format import Format, Grid, Quantised, Share
from export.weights.rows import by_rows
from model.block_linear import BLOCK_FORMS, GROUP, numbers, relaid, rounded


@dataclass(frozen=True)
class Blocks(Quantised):
    """Blocks of codes with their scales. The inputs of linear layers are rounded to 8 bits per block of 32
    when a layer is run. A stored matrix is uint8 [rows, bytes of a row], for GGUF's types as in a GGUF file.

    Attributes:
        name: name of the type, a key of `model.block_linear.BLOCK_FORMS`.
        bits: bits of a code.
        group_size: number of weights in a block.
    """

    kind: ClassVar[str] = "blocks"
    rounds_inputs: ClassVar[bool] = True
    by_operator: ClassVar[bool] = True
    name: str
    bits: int
    group_size: int

    @staticmethod
    def of(name: str) -> "Blocks":
        """Returns the format of a type, by its name."""
        form = BLOCK_FORMS[name]
        return Blocks(name, form.bits, form.columns)

    def __str__(self) -> str:
        return self.name

    @property
    def max_ppl_increase(self) -> float:
        return 0.05 if self.bits == 8 else 0.1

    @property
    def fallback(self) -> Format:
        """A type with shorter blocks, as llama.cpp chooses it; float32 for the finest."""
        return FLOAT if self.name == "Q8_0" else Blocks.of(_SHORTER.get(self.name, "Q8_0"))

    def nbytes(self, rows: int, columns: int) -> int:
        """Returns the size of a matrix, whose rows are stored in whole groups."""
        return -(-rows // GROUP) * GROUP * (columns // self.group_size) * BLOCK_FORMS[self.name].block_bytes

    def stored(self, weight: Tensor, rounding: str) -> Tensor:
        (blocks,) = by_rows(weight, lambda part: [blocks_of(part.float(), self.name)])
        return blocks

    def grid(self, w: Tensor, h: Tensor) -> Scales:
        return fitted(w, h, self.name)

    def gathered(self, grids: Sequence[Grid], codes: Tensor) -> list[Tensor]:
        heads = [grid.head for grid in grids if isinstance(grid, Scales)]
        blocks = torch.unflatten(codes, 1, (-1, self.group_size)).contiguous()
        return [packed(torch.stack(heads, dim=1), blocks, self.name)]

    def restored(self, *tensors: Tensor) -> Tensor:
        (blocks,) = tensors
        return blocks

    def rounded(self, x: Tensor) -> Tensor:
        codes, scale = rounded(x.reshape(-1, x.shape[-1]))
        return (codes * scale.unsqueeze(-1)).view(x.shape)

    def random(self, shape: Sequence[int]) -> Tensor:
        """Returns random bytes, because only the shape of an operator's argument matters."""
        return torch.randint(256, (shape[0], self.nbytes(GROUP, shape[1]) // GROUP), dtype=torch.uint8)

    def linear(self, stored: Tensor, bias: Tensor | None, width: int | None = None) -> nn.Module:
        return BlockLinear(self.name, stored, bias)

    def embedding(self, stored: Tensor, columns: int) -> nn.Module:
        return BlockEmbedding(self.name, stored, columns)

    def parts(self, stored: Tensor) -> list[tuple[str, Tensor]]:
        return [("", relaid(stored, self.name).flatten())]

    def share(self, stored: Tensor, axis: int, take: Share) -> Tensor:
        return take(stored)


_SHORTER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1"}

_ROWS_AT_ONCE = 512


class BlockLinear(nn.Module):
    """A linear layer with weights in blocks."""

    bias: Tensor | None

    def __init__(self, kind: str, weight: Tensor, bias: Tensor | None) -> None:
        """Takes GGUF's blocks [N, row bytes]."""
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., K] to [..., N]. In an export, only the shapes of weights matter. In eager mode, the rounded inputs
        are multiplied by the numbers that the blocks stand for, some rows of the matrix at a time. The operator's own
        definition scales each product of 32 columns, which takes many times as long and differs by rounding only.
        """
        if torch.compiler.is_exporting():
            out: Tensor = torch.ops.llama_pte.linear(x, self.weight, self.bias, self.kind, self.weight.shape[0])
            return out
        x = Blocks.of(self.kind).rounded(x)
        products = [x @ numbers(part, self.kind).T for part in torch.split(self.weight, _ROWS_AT_ONCE)]
        out = torch.cat(products, dim=-1)
        return out if self.bias is None else out + self.bias


class BlockEmbedding(nn.Module):
    """An embedding with rows in blocks."""

    weight: Tensor

    def __init__(self, kind: str, weight: Tensor, columns: int) -> None:
        """Takes GGUF's blocks [V, row bytes]; in an export, any tensor that stands in for them."""
        super().__init__()
        self.kind = kind
        self.columns = columns
        self.register_buffer("weight", weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens [B, L], int64, to rows [B, L, D]. In eager mode, only these rows are unpacked."""
        if not torch.compiler.is_exporting():
            return numbers(self.weight[tokens.flatten()], self.kind).view(*tokens.shape, self.columns)
        out: Tensor = torch.ops.llama_pte.block_rows(self.weight, tokens, self.kind, self.columns)
        return out
