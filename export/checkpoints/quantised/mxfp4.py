"""MXFP4 as gpt-oss stores its experts: 4-bit floats in blocks of 32 with a power of two as scale."""

import torch
from torch import Tensor

from export.checkpoints.checkpoint import Index, TensorSource
from export.checkpoints.quantised.method import Method, Parts, Settings, UnreadableError

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor((*_MAGNITUDES, *(-value for value in _MAGNITUDES)))
_BIAS = 127  # of the stored exponents


def _weight(parts: Parts, settings: Settings, module: str) -> TensorSource:
    """Returns the matrices of all experts, [E, in, out], of which only the experts that are asked for are read."""
    shape = parts["codes"].shape
    if len(shape) != 4 or shape[3] != 16 or parts["scales"].shape != shape[:3]:
        raise UnreadableError(f"{module} has blocks {list(shape)} and scales {list(parts['scales'].shape)}")
    experts, outputs, blocks, _ = shape

    def read(index: Index) -> Tensor:
        codes, scales = (parts[role].read(index[:1]) for role in ("codes", "scales"))
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).reshape(-1)
        values = _VALUES.index_select(0, nibbles.int()).view(*codes.shape[:3], 32)
        scaled = torch.ldexp(values, (scales.int() - _BIAS).unsqueeze(-1))
        return scaled.reshape(len(codes), outputs, blocks * 32).transpose(1, 2)[(slice(None), *index[1:])]

    return TensorSource((experts, blocks * 32, outputs), read)


MXFP4 = Method(
    title=lambda settings: "MXFP4",
    endings={"codes": "_blocks", "scales": "_scales"},
    weight=_weight,
    result="",
)
