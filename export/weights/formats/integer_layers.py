"""Layers with torchao's low-bit integers: an embedding, and a linear layer that rounds its inputs when it is run."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.weights.rows import by_rows, row_chunks

if TYPE_CHECKING:
    from torchao.quantization import IntxUnpackedToInt8Tensor


class QuantizedEmbedding(nn.Module):
    """An embedding of low-bit rows, with one scale per row or per group: row = codes * scales."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: "IntxUnpackedToInt8Tensor") -> None:
        """Takes the quantised matrix, as returned by `stored`, [V, D]."""
        from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  defines the operators

        super().__init__()
        self.four = str(weight.target_dtype) == "torch.int4"
        codes, scales = weight.qdata, weight.scale.float()
        self.register_buffer("codes", _pairs(codes) if self.four else codes)
        self.register_buffer("scales", scales if self.four else scales.squeeze(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens [B, L], int64, to rows [B, L, D]."""
        if torch.compiler.is_exporting():
            lookup, half = torch.ops.quantized_decomposed, 8 if self.four else 128
            operator = lookup.embedding_4bit if self.four else lookup.embedding_byte
            found: Tensor = operator(self.codes, self.scales, None, -half, half - 1, tokens)
            return found
        codes, scales = self.codes[tokens], self.scales[tokens]
        if self.four:
            codes = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(-2).to(torch.int8) - 8
        scales = scales.view(*tokens.shape, -1, 1)
        return (codes.float().view(*scales.shape[:-1], -1) * scales).flatten(-2)


def _pairs(codes: Tensor) -> Tensor:
    """Packs 4-bit integers into bytes for embedding_4bit with an offset of 8, the first of each two in the
    upper half.
    """
    (packed,) = by_rows(codes, lambda rows: [_pack_nibbles(rows)])
    return packed


def _pack_nibbles(rows: Tensor) -> Tensor:
    flat = rows.to(torch.uint8).add_(8).view(-1)
    return (flat[::2] << 4).bitwise_or_(flat[1::2]).view(rows.shape[0], -1)


class QuantizedLinear(nn.Module):
    """A linear layer with low-bit weights, whose inputs are quantised to 8 bits per token at run time."""

    weight: "IntxUnpackedToInt8Tensor"
    bias: Tensor | None

    def __init__(self, weight: "IntxUnpackedToInt8Tensor", bias: Tensor | None, width: int | None = None) -> None:
        """Takes a quantised matrix, and the number of consecutive inputs that share quantisation parameters; None for
        all inputs.
        """
        super().__init__()
        self.width = width or weight.shape[1]
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out].

        In an export, the layer is torchao's pattern, which backends recognise. In eager mode, it does XNNPACK's
        arithmetic up to float rounding, on a part of the rows at a time.
        """
        if torch.compiler.is_exporting():
            return F.linear(x, self.weight, self.bias)
        x = self._rounded(x)
        weight, rows = self.weight, list[Tensor]()
        for codes, scale in zip(row_chunks(weight.qdata), row_chunks(weight.scale, like=weight.qdata), strict=True):
            values = codes.view(*scale.shape, -1) * scale.float().unsqueeze(-1)
            rows.append(F.linear(x, values.view(codes.shape)))
        out = torch.cat(rows, dim=-1)
        return out if self.bias is None else out + self.bias

    def _rounded(self, x: Tensor) -> Tensor:
        """Quantises and dequantises the inputs. A shorter last part is padded with zeros, which do not change its
        range.
        """
        parts = F.pad(x, (0, -x.shape[-1] % self.width)).reshape(*x.shape[:-1], -1, self.width)
        return as_8_bits(parts).flatten(-2)[..., : x.shape[-1]]


def as_8_bits(x: Tensor) -> Tensor:
    """Rounds every token of x, [..., D], to 256 steps between its extremes, one of which is 0 (google/XNNPACK,
    src/xnnpack/quantization.h, xnn_f32_qd8_asymmetric_quantization_params).
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    steps = torch.where(low == high, 1.0, 255 / (high - low))
    from_low, from_high = -128 - low * steps, 127 - high * steps
    zero = torch.where(from_low + from_high < -2, from_low, from_high).clamp(-128, 127).round()
    codes = ((x * steps).round() + zero).clamp(-128, 127)
    return (codes - zero) * (1 / steps)
