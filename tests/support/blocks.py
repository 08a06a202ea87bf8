"""What weights in blocks stand for, as others read them: gguf and, for the formats that it does not have, torchao."""

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor
from torchao.prototype.custom_fp_utils import _floatx_unpacked_to_f32

MICROSCALING = {"MXFP6": 25, "MXINT8": 33}
"""Bytes of a block of 32 numbers in the formats that gguf does not have: an exponent and the elements."""


def sizes(kind: str) -> tuple[int, int]:
    """Returns the columns and the bytes of a block."""
    return (32, MICROSCALING[kind]) if kind in MICROSCALING else GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def numbers(blocks: Tensor, kind: str) -> Tensor:
    """Returns the float32 numbers [N, K] of blocks [N, row bytes] uint8."""
    if kind not in MICROSCALING:
        return torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind]).copy())
    exponents, elements = torch.split(blocks.unflatten(1, (-1, MICROSCALING[kind])), [1, MICROSCALING[kind] - 1], -1)
    if kind == "MXINT8":
        values = elements.view(torch.int8).float() / 64
    else:  # two bits of each element, four to a byte, then four bits of each
        high, low = torch.split(elements, [8, 16], dim=-1)
        twos = (high.unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3).flatten(-2)
        values = _floatx_unpacked_to_f32(twos << 4 | torch.cat((low & 15, low >> 4), dim=-1), ebits=2, mbits=3)
    return (values * torch.exp2(exponents.float() - 127)).flatten(1)
