"""How a KV cache stores a row, the head_dim numbers of one head at one position: cpp_runner/src/attention/rows.inc does
the same on devices.
"""

import torch
from torch import Tensor

KV_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""What `--kv-dtype` takes -> the cache's dtype. Rows of int8 are Dh codes and then the four bytes of their scale."""

_SCALE_BYTES = 4


def row_width(head_dim: int, dtype: str) -> int:
    """W, the elements of a row."""
    return head_dim + _SCALE_BYTES if dtype == "int8" else head_dim


def row_bytes(head_dim: int, dtype: str) -> int:
    """The bytes of a row."""
    return row_width(head_dim, dtype) * getattr(torch, dtype).itemsize


def encode(rows: Tensor, dtype: str) -> Tensor:
    """[..., Dh] float32 -> [..., W] of a cache's dtype.

    An int8 code is the nearest integer, of two the even one, to the number's ratio to the scale, max |row| / 127.
    """
    if dtype != "int8":
        return rows.to(getattr(torch, dtype))
    scale = rows.abs().amax(dim=-1, keepdim=True) / 127
    codes = torch.where(scale == 0, 0.0, rows / scale).round().to(torch.int8)
    return torch.cat((codes, scale.view(torch.int8)), dim=-1)


def decode(rows: Tensor) -> Tensor:
    """[..., W] of a cache's dtype -> [..., Dh] float32."""
    if rows.dtype != torch.int8:
        return rows.float()
    codes, scale = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return codes.float() * scale
