"""Quantisation of weights to low-bit integers with scales, by torchao, and of activations when a layer is run."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from executorch.exir.passes import (
    _quant_patterns_and_replacements,  # noqa: F401  defines embedding_byte, embedding_4bit
)
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq, choose_qparams_affine

from export.weights.scheme import Format

_ELEMENTS_AT_ONCE = 1 << 18
"""Number of elements of a matrix that are quantised at a time, few enough to stay in the processor's caches."""


def stored(weight: Tensor, form: Format, rounding: str) -> Tensor:
    """Returns a matrix [rows, columns] in a format: float32, or torchao's integers and scales."""
    if form.bits is None:
        return weight.float()
    codes, scale = by_rows(weight, lambda rows: ROUNDINGS[rounding](rows.float(), form))
    return from_parts(codes, scale, form)


def random(shape: Sequence[int], form: Format) -> Tensor:
    """Returns a random matrix in the same form as `stored`."""
    if form.bits is None:
        return torch.randn(*shape)
    half = 1 << (form.bits - 1)
    codes = torch.randint(-half, half, tuple(shape), dtype=torch.int8)
    return from_parts(codes, torch.rand(shape[0], shape[1] // (form.group_size or shape[1])), form)


def from_parts(codes: Tensor, scale: Tensor, form: Format) -> IntxUnpackedToInt8Tensor:
    """Returns torchao's tensor of int8 codes [rows, columns] and scales [rows, groups]."""
    scale = scale.to(_scale_dtype(form))
    zero, block = torch.zeros(scale.shape, dtype=torch.int8), (1, form.group_size or codes.shape[1])
    dtype = getattr(torch, f"int{form.bits}")
    return IntxUnpackedToInt8Tensor(codes, scale, zero, dtype, block, torch.float32, "int8_asym_per_token")


def _scale_dtype(form: Format) -> torch.dtype:
    return torch.bfloat16 if form.group_size else torch.float32


def nearest(weight: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of float32 rows. The scale of a group covers its largest weight, and each weight is
    rounded to the nearest code.
    """
    block, most = (1, form.group_size or weight.shape[1]), 1 << (form.bits or 0) - 1
    scale, _ = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, block, torch.int8, -most, most - 1, zero_point_dtype=torch.int8, keepdim=True
    )
    return codes_for(weight, scale, form)


def hqq(weight: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Returns codes and scales with the least squared error of each group (half-quadratic quantisation,
    mobiusml.github.io/hqq_blog).
    """
    block, most = [1, form.group_size or weight.shape[1]], 1 << (form.bits or 0) - 1
    _, scale = _choose_qparams_and_quantize_scale_only_hqq(weight, block, -most, most - 1)
    return codes_for(weight, scale, form)


ROUNDINGS: dict[str, Callable[[Tensor, Format], tuple[Tensor, Tensor]]] = {"nearest": nearest, "hqq": hqq}
"""The rounding methods available to `--rounding`."""


def codes_for(weight: Tensor, scale: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Returns the nearest codes for given scales [rows, groups], and the scales in the dtype in which they are
    stored.
    """
    scale = scale.to(_scale_dtype(form))
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


class QuantizedEmbedding(nn.Module):
    """An embedding of low-bit rows, with one scale per row or per group: row = codes * scales."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: IntxUnpackedToInt8Tensor) -> None:
        """Takes the quantised matrix, as returned by `stored`, [V, D]."""
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

    weight: IntxUnpackedToInt8Tensor

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None, width: int | None = None) -> None:
        """Takes a quantised matrix, and the number of consecutive inputs that share quantisation parameters; None for
        all inputs.
        """
        super().__init__()
        self.width = width or weight.shape[1]
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        self.bias = bias

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


def quantize(module: nn.Module, stored: Callable[[str], Tensor], widths: Mapping[str, int] | None = None) -> nn.Module:
    """Replaces the weight of every linear layer below `module` by its stored form, in place.

    Args:
        stored: returns the stored form of a weight, by its name in `module`.
        widths: maps the name of a layer to the number of its inputs that share quantisation parameters, see
            `model.tensor_parallel.columns`. Layers not listed use all inputs.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            weight = stored(f"{name}.weight")
            if isinstance(weight, IntxUnpackedToInt8Tensor):
                width = (widths or {}).get(name.rpartition(".")[2])
                module.set_submodule(name, QuantizedLinear(weight, layer.bias, width))
            else:
                layer.weight = nn.Parameter(weight, requires_grad=False)
    return module


def by_rows(matrix: Tensor, make: Callable[[Tensor], Sequence[Tensor]], at_once: int | None = None) -> list[Tensor]:
    """Applies `make` to a matrix, a part of its rows at a time, and joins the resulting tensors along the rows.

    Args:
        make: returns tensors with one row for each row of its argument.
        at_once: number of elements of a part; None for a small default.
    """
    whole, start = list[Tensor](), 0
    for rows in torch.split(matrix, max(1, at_once // matrix.shape[1])) if at_once else row_chunks(matrix):
        made = make(rows)
        whole = whole or [torch.empty((len(matrix), *part.shape[1:]), dtype=part.dtype) for part in made]
        for target, part in zip(whole, made, strict=True):
            target[start : start + len(rows)] = part
        start += len(rows)
    return whole


def row_chunks(matrix: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
    """Yields a matrix in parts of whole rows, each small compared with a large model's matrices. With `like`, the parts
    have the same numbers of rows as those of `like`.
    """
    columns = (matrix if like is None else like).shape[1]
    yield from torch.split(matrix, max(1, _ELEMENTS_AT_ONCE // columns))
