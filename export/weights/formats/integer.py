"""Integer, the format of torchao's low-bit integers with scales, which XNNPACK runs.

torchao is imported in the functions that use it, because it takes seconds to load, and sizes are known without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from export.weights.formats.block_rounding import fitted_scale
from export.weights.formats.format import Format, Grid, Quantised, Share
from export.weights.formats.integer_layers import QuantizedEmbedding, QuantizedLinear, as_8_bits
from export.weights.rows import by_rows
from model.block_linear import BLOCK_FORMS

if TYPE_CHECKING:
    from torchao.quantization import IntxUnpackedToInt8Tensor


@dataclass(frozen=True)
class Integer(Quantised):
    """Integers with one scale per row or per group of a row. The inputs of linear layers are rounded to 8 bits per
    token when a layer is run.

    Attributes:
        bits: 8 or 4.
        group_size: number of consecutive weights in a row that share a scale; None for one scale per row.
    """

    kind: ClassVar[str] = "integer"
    rounds_inputs: ClassVar[bool] = True
    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f" in groups of {self.group_size}" if self.group_size else " a row")

    @property
    def swaps_pairs(self) -> bool:
        return self.bits == 4

    @property
    def max_ppl_increase(self) -> float:
        return 0.05 if self.bits == 8 else 0.1

    @property
    def fallback(self) -> Format:
        return BYTE

    def nbytes(self, rows: int, columns: int) -> int:
        """Returns the size of weights and scales. Scales of groups are in bfloat16, as in XNNPACK."""
        scales = rows * 4 if self.group_size is None else rows * columns // self.group_size * 2
        return rows * columns * self.bits // 8 + scales

    def stored(self, weight: Tensor, rounding: str) -> Tensor:
        codes, scale = by_rows(weight, lambda rows: ROUNDINGS[rounding](rows.float(), self))
        return self.from_codes(codes, scale)

    def random(self, shape: Sequence[int]) -> Tensor:
        half = 1 << (self.bits - 1)
        codes = torch.randint(-half, half, tuple(shape), dtype=torch.int8)
        return self.from_codes(codes, torch.rand(shape[0], shape[1] // (self.group_size or shape[1])))

    def linear(self, stored: Tensor, bias: Tensor | None, width: int | None = None) -> nn.Module:
        return QuantizedLinear(_torchao(stored), bias, width)

    def embedding(self, stored: Tensor, columns: int) -> nn.Module:
        return QuantizedEmbedding(_torchao(stored))

    def parts(self, stored: Tensor) -> list[tuple[str, Tensor]]:
        """Returns the data that XNNPACK stores: codes, of 4 bits packed in pairs, and scales."""
        weight = _torchao(stored)
        codes, scale = weight.qdata, weight.scale
        if self.bits == 4:
            (codes,) = by_rows(codes, lambda rows: [_packed(rows)])
        return [("", codes.contiguous()), ("scale_", scale.contiguous())]

    def share(self, stored: Tensor, axis: int, take: Share) -> Tensor:
        weight = _torchao(stored)
        scale: Tensor = weight.scale
        if axis == 0 or self.group_size:
            scale = take(scale, padding=1.0)  # XNNPACK does not accept a scale of 0
        return self.from_codes(take(weight.qdata), scale)

    def grid(self, w: Tensor, h: Tensor) -> "IntegerGrid":
        scale = fitted_scale(w, h, BLOCK_FORMS[f"Q{self.bits}_0"], positive=True)
        return IntegerGrid(self, torch.where(scale > 0, scale, 1.0).to(self.scale_dtype))

    def gathered(self, grids: Sequence[Grid], codes: Tensor) -> list[Tensor]:
        scales = [grid.scale for grid in grids if isinstance(grid, IntegerGrid)]
        return [codes, torch.stack(scales, dim=1)]

    def restored(self, *tensors: Tensor) -> Tensor:
        return self.from_codes(*tensors)

    def rounded(self, x: Tensor) -> Tensor:
        return as_8_bits(x)

    def from_codes(self, codes: Tensor, scale: Tensor) -> "IntxUnpackedToInt8Tensor":
        """Returns the stored matrix of int8 codes [rows, columns] and scales [rows, groups]."""
        from torchao.quantization import IntxUnpackedToInt8Tensor

        scale = scale.to(self.scale_dtype)
        zero, block = torch.zeros(scale.shape, dtype=torch.int8), (1, self.group_size or codes.shape[1])
        dtype = getattr(torch, f"int{self.bits}")
        return IntxUnpackedToInt8Tensor(codes, scale, zero, dtype, block, torch.float32, "int8_asym_per_token")

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype in which scales are stored."""
        return torch.bfloat16 if self.group_size else torch.float32

    @property
    def largest(self) -> int:
        """The largest code plus one: codes are from -largest to largest - 1."""
        return 1 << (self.bits - 1)


BYTE = Integer(8)


@dataclass(frozen=True)
class IntegerGrid:
    """Multiples of a scale for each row.

    Attributes:
        form: format of the matrix.
        scale: [N], in the dtype in which it is stored.
    """

    form: Integer
    scale: Tensor

    def round(self, w: Tensor, column: int) -> tuple[Tensor, Tensor]:
        codes = (w * (1 / self.scale).float()).round().clamp(-self.form.largest, self.form.largest - 1)
        return codes.to(torch.int8), codes * self.scale.float()  # the inverse in the scale's dtype, as in torchao


def _torchao(stored: Tensor) -> "IntxUnpackedToInt8Tensor":
    from torchao.quantization import IntxUnpackedToInt8Tensor

    assert isinstance(stored, IntxUnpackedToInt8Tensor), type(stored)
    return stored


def _packed(codes: Tensor) -> Tensor:
    """Packs 4-bit integers into bytes with an offset of 8, the first of each two in the lower half."""
    flat = codes.to(torch.uint8).add_(8).view(-1)
    return (flat[1::2] << 4).bitwise_or_(flat[::2]).view(codes.shape[0], -1)


def nearest(weight: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of float32 rows. The scale of a group covers its largest weight, and each weight is
    rounded to the nearest code.
    """
    from torchao.quantization import MappingType
    from torchao.quantization.quant_primitives import choose_qparams_affine

    block, most = (1, form.group_size or weight.shape[1]), form.largest
    scale, _ = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, block, torch.int8, -most, most - 1, zero_point_dtype=torch.int8, keepdim=True
    )
    return codes_for(weight, scale, form)


def hqq(weight: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    """Returns codes and scales with the least squared error of each group (half-quadratic quantisation,
    mobiusml.github.io/hqq_blog).
    """
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq

    block, most = [1, form.group_size or weight.shape[1]], form.largest
    _, scale = _choose_qparams_and_quantize_scale_only_hqq(weight, block, -most, most - 1)
    return codes_for(weight, scale, form)


ROUNDINGS: dict[str, Callable[[Tensor, Integer], tuple[Tensor, Tensor]]] = {"nearest": nearest, "hqq": hqq}
"""The rounding methods available to `--rounding`."""


def codes_for(weight: Tensor, scale: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    """Returns the nearest codes for given scales [rows, groups], and the scales in the dtype in which they are
    stored.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    scale = scale.to(form.scale_dtype)
    found = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, form.group_size or weight.shape[1]),
        getattr(torch, f"int{form.bits}"),
        activation_quantization="int8_asym_per_token",
        intx_choose_qparams_algorithm=None,
        custom_scale=scale,
        custom_zero_point=torch.zeros(scale.shape, dtype=torch.int8),
    )
    return found.qdata, found.scale
