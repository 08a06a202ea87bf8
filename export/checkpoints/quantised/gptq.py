"""GPTQ's layout, written by AutoGPTQ and GPTQModel: integers packed along the inputs, with an order of groups."""

from collections.abc import Mapping

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
    word_count,
)

_ZERO_SHIFTS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 0}
"""Number that is added to stored zero points, by the name of the format."""


def _format(settings: Settings) -> str:
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq")


def _check(settings: Settings) -> None:
    if _format(settings) not in _ZERO_SHIFTS:
        raise UnreadableError(f"its format {_format(settings)!r} is unsupported (supported: {', '.join(_ZERO_SHIFTS)})")
    if settings["bits"] not in (2, 3, 4, 8):
        raise UnreadableError(f"{settings['bits']} bits are unsupported (supported: 2, 3, 4 and 8)")
    if any(not str(rule).startswith("-:") for rule in settings.get("dynamic") or ()):
        raise UnreadableError("modules with settings of their own (dynamic) are unsupported")


def _weight(parts: Parts, settings: Settings, module: str) -> TensorSource:
    bits, shift = settings["bits"], _ZERO_SHIFTS[_format(settings)]
    (words, outputs), (groups, _) = parts["codes"].shape, parts["scales"].shape
    inputs = parts["groups"].shape[0] if "groups" in parts else words * 32 // bits
    size = settings.get("group_size") or -1
    size = size if size > 0 else inputs
    if "groups" not in parts and groups != -(-inputs // size):
        raise UnreadableError(f"{module} has {groups} groups, not {-(-inputs // size)}")
    zeros, codes = (groups, word_count(outputs, bits)), (word_count(inputs, bits), outputs)
    expect(parts, module, codes=codes, zeros=zeros, scales=(groups, outputs))

    def read() -> Tensor:
        codes = unpacked(parts["codes"].read(()).T, bits, inputs)
        zeros = unpacked(parts["zeros"].read(()), bits, outputs)
        zeros = (zeros.short() + shift) & ((1 << bits) - 1)
        order = parts["groups"].read(()).long() if "groups" in parts else torch.arange(inputs) // size
        scales = parts["scales"].read(()).float()
        return (codes.float() - zeros.float().T[:, order]) * scales.T[:, order]

    return matrix((outputs, inputs), read)


GPTQ = Method(
    title=lambda settings: f"GPTQ, {grouped(settings)}",
    endings={"codes": ".qweight", "zeros": ".qzeros", "scales": ".scales", "groups": ".g_idx"},
    weight=_weight,
    optional=frozenset({"groups"}),
    check=_check,
)
