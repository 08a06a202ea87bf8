"""AWQ's layout "gemm": 4-bit integers packed along the outputs, in an order of its own."""

import torch
from torch import Tensor

from export.checkpoints.checkpoint import TensorSource
from export.checkpoints.quantised.method import (
    Method,
    Parts,
    Settings,
    UnreadableError,
    expect,
    grouped,
    matrix,
    unpacked,
)

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word, counted from the lowest bits, of each of eight consecutive outputs."""


def _check(settings: Settings) -> None:
    version = str(settings.get("version") or "gemm").lower()
    if version != "gemm":
        raise UnreadableError(f"its version {version!r} is unsupported (supported: gemm)")
    if _bits(settings) != 4 or not settings.get("zero_point", True):
        raise UnreadableError("AWQ is supported with 4 bits and zero points only")


def _bits(settings: Settings) -> int:
    return int(settings.get("bits") or settings.get("w_bit") or 4)


def _weight(parts: Parts, settings: Settings, module: str) -> TensorSource:
    (inputs, words), (groups, _) = parts["codes"].shape, parts["scales"].shape
    outputs = words * 8
    expect(parts, module, zeros=(groups, words), scales=(groups, outputs))
    if inputs % groups:
        raise UnreadableError(f"{module} has {inputs} inputs in {groups} groups")

    def read() -> Tensor:
        codes, zeros = (_codes(parts[role].read(())) for role in ("codes", "zeros"))
        order = torch.arange(inputs) // (inputs // groups)
        return ((codes - zeros[order]) * parts["scales"].read(()).float()[order]).T.contiguous()

    return matrix((outputs, inputs), read)


def _codes(words: Tensor) -> Tensor:
    """Returns the packed integers in the order of the outputs, as float32 [N, outputs]."""
    rows, count = words.shape
    return unpacked(words, 4, count * 8).view(rows, count, 8)[:, :, list(_ORDER)].reshape(rows, count * 8).float()


def _title(settings: Settings) -> str:
    size = settings.get("group_size", settings.get("q_group_size"))
    return f"AWQ, {grouped({'bits': _bits(settings), 'group_size': size})}"


AWQ = Method(
    title=_title,
    endings={"codes": ".qweight", "zeros": ".qzeros", "scales": ".scales"},
    weight=_weight,
    check=_check,
)
