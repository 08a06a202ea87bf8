"""quantize: weights become low-bit integers with a scale per group, by torchao; activations when a layer is run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  defines embedding_byte
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType
from torchao.quantization.quant_primitives import choose_qparams_affine

_ELEMENTS_AT_ONCE = 1 << 18
"""Elements of a matrix that are quantised at a time: few enough to stay in the processor's caches."""


@dataclass(frozen=True)
class Scheme:
    """How weights are stored and multiplied.

    Attributes:
        linear_bits: of the linear layers' weights; activations are then quantised to 8 bits, per token, as they come.
            None for float32.
        group_size: consecutive weights of an output that share a scale.
        embedding_bits: of the embedding, one scale a row; None for float32.
    """

    linear_bits: int | None = None
    group_size: int = 32
    embedding_bits: int | None = None

    def linear(self, weight: Tensor) -> Tensor:
        """A linear layer's weight [out, in] as the layer is to use it: float32, or torchao's integers and scales."""
        if self.linear_bits is None:
            return weight.float()
        codes, scale = by_rows(weight, lambda rows: self._grouped(rows.float()))
        return self._from_parts(codes, scale)

    def random_linear(self, weight: Tensor) -> Tensor:
        """Random values in the form that `linear` gives; only the weight's shape is looked at."""
        if self.linear_bits is None:
            return torch.randn(weight.shape)
        rows, columns = weight.shape
        half = 1 << (self.linear_bits - 1)
        codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
        return self._from_parts(codes, torch.rand(rows, columns // self.group_size).bfloat16())

    def embedding(self, weight: Tensor) -> nn.Module:
        """The layer that looks rows of `weight` [V, D] up."""
        if self.embedding_bits is None:
            embedding = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
            embedding.weight = nn.Parameter(weight.float(), requires_grad=False)
            return embedding
        return QuantizedEmbedding(weight)

    def _grouped(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Round-to-nearest: codes, and a scale a group in bfloat16, the format in which XNNPACK holds them."""
        block, most = (1, self.group_size), 1 << (self.linear_bits or 0) - 1
        scale, zero = choose_qparams_affine(
            weight, MappingType.SYMMETRIC, block, torch.int8, -most, most - 1, zero_point_dtype=torch.int8, keepdim=True
        )
        found = IntxUnpackedToInt8Tensor.from_hp(
            weight,
            block,
            getattr(torch, f"int{self.linear_bits}"),
            activation_quantization="int8_asym_per_token",
            intx_choose_qparams_algorithm=None,
            custom_scale=scale.bfloat16(),
            custom_zero_point=zero,
        )
        return found.qdata, found.scale

    def _from_parts(self, codes: Tensor, scale: Tensor) -> IntxUnpackedToInt8Tensor:
        zero, dtype = torch.zeros(scale.shape, dtype=torch.int8), getattr(torch, f"int{self.linear_bits}")
        block = (1, self.group_size)
        return IntxUnpackedToInt8Tensor(codes, scale, zero, dtype, block, torch.float32, "int8_asym_per_token")


SCHEMES = {"fp32": Scheme(), "8da4w": Scheme(linear_bits=4, embedding_bits=8)}
"""What `--quantize` takes. 8da4w: 8-bit dynamic activations and 4-bit weights."""


class QuantizedEmbedding(nn.Module):
    """An embedding of 8-bit rows with a scale each, symmetric: row = codes * scale."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Quantises `weight`, [V, D]."""
        super().__init__()
        codes, scales = by_rows(weight, lambda rows: _per_row(rows.float()))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] int64 -> [B, L, D]."""
        if torch.compiler.is_exporting():
            found: Tensor = torch.ops.quantized_decomposed.embedding_byte(
                self.codes, self.scales, None, -128, 127, tokens
            )
            return found
        return self.codes[tokens].float() * self.scales[tokens].unsqueeze(-1)


class QuantizedLinear(nn.Module):
    """A linear layer of low-bit weights, whose inputs are quantised to 8 bits, per token, as they come."""

    weight: IntxUnpackedToInt8Tensor

    def __init__(self, weight: IntxUnpackedToInt8Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]. Exported, it is torchao's pattern, which backends know; run, it is XNNPACK's
        arithmetic to float rounding, a part of the rows at a time.
        """
        if torch.compiler.is_exporting():
            return F.linear(x, self.weight, self.bias)
        x, weight, rows = as_8_bits(x), self.weight, list[Tensor]()
        for codes, scale in zip(row_chunks(weight.qdata), row_chunks(weight.scale, like=weight.qdata), strict=True):
            values = codes.view(*scale.shape, -1) * scale.float().unsqueeze(-1)
            rows.append(F.linear(x, values.view(codes.shape)))
        out = torch.cat(rows, dim=-1)
        return out if self.bias is None else out + self.bias


def as_8_bits(x: Tensor) -> Tensor:
    """Rounds every token of x, [..., D], to 256 steps between its extremes, 0 being one of them (google/XNNPACK,
    src/xnnpack/quantization.h, xnn_f32_qd8_asymmetric_quantization_params).
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    steps = torch.where(low == high, 1.0, 255 / (high - low))
    from_low, from_high = -128 - low * steps, 127 - high * steps
    zero = torch.where(from_low + from_high < -2, from_low, from_high).clamp(-128, 127).round()
    codes = ((x * steps).round() + zero).clamp(-128, 127)
    return (codes - zero) * (1 / steps)


def quantize(module: nn.Module, scheme: Scheme) -> nn.Module:
    """Quantises every linear layer below `module`, in place."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            weight = scheme.linear(layer.weight)
            if scheme.linear_bits is None:
                layer.weight = nn.Parameter(weight, requires_grad=False)
            else:
                module.set_submodule(name, QuantizedLinear(weight, layer.bias))
    return module


def _per_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scales.unsqueeze(1)).round().to(torch.int8), scales


def by_rows(matrix: Tensor, make: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """What `make` makes of a matrix, given a part of its rows at a time: tensors that have a row for each row."""
    whole, start = list[Tensor](), 0
    for rows in row_chunks(matrix):
        made = make(rows)
        whole = whole or [torch.empty((len(matrix), *part.shape[1:]), dtype=part.dtype) for part in made]
        for target, part in zip(whole, made, strict=True):
            target[start : start + len(rows)] = part
        start += len(rows)
    return whole


def row_chunks(matrix: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
    """A matrix in parts of whole rows, each small beside a large model's matrices; in as many rows as those of `like`
    are parted.
    """
    columns = (matrix if like is None else like).shape[1]
    yield from torch.split(matrix, max(1, _ELEMENTS_AT_ONCE // columns))
