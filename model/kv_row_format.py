"""The storage format of a KV cache row, which holds the head_dim numbers of one head at one position.
cpp_runner/src/attention/rows.inc implements the same format in the C++ runner.
"""

import torch
from torch import Tensor

KV_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""Maps each value of `--kv-dtype` to the dtype of the cache. An int8 row holds Dh codes followed by the four bytes of
its float32 scale.
"""

_SCALE_BYTES = 4


def row_width(head_dim: int, dtype: str) -> int:
    """Returns W, the number of elements in a row."""
    return head_dim + _SCALE_BYTES if dtype == "int8" else head_dim


def row_bytes(head_dim: int, dtype: str) -> int:
    """Returns the number of bytes in a row."""
    return row_width(head_dim, dtype) * getattr(torch, dtype).itemsize


def encode(rows: Tensor, dtype: str) -> Tensor:
    """Encodes float32 rows [..., Dh] as [..., W] in the dtype of a cache.

    An int8 row is scaled by max |row| / 127. Each code is the number divided by the scale, rounded to the nearest
    integer, with ties to even.
    """
    if dtype != "int8":
        return rows.to(getattr(torch, dtype))
    scale = rows.abs().amax(dim=-1, keepdim=True) / 127
    codes = torch.where(scale == 0, 0.0, rows / scale).round().to(torch.int8)
    return torch.cat((codes, scale.view(torch.int8)), dim=-1)


def decode(rows: Tensor) -> Tensor:
    """Decodes cache rows [..., W] to float32 [..., Dh]."""
    if rows.dtype != torch.int8:
        return rows.float()
    codes, scale = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return codes.float() * scale
