"""bitsandbytes: 8-bit integers with a scale per row, and 4-bit codes of a table with scales that may be coded too."""

import json
import math
from typing import Any

import torch
from torch import Tensor

from export.checkpoints.checkpoint import TensorSource
from export.checkpoints.quantised.method import Method, Parts, Settings, UnreadableError, expect, matrix

_PER_127 = 7.874015718698502e-3  # bitsandbytes multiplies by this number instead of dividing by 127


def _four_bits(parts: Parts, settings: Settings, module: str) -> TensorSource:
    """Returns a matrix whose numbers are places in a table of 16, with a scale for each block of consecutive ones."""
    stored = parts.get("nf4") or parts.get("fp4")
    if stored is None:
        raise UnreadableError(f"it lacks {module}.weight.quant_state.bitsandbytes__nf4")
    state = json.loads(bytes(stored.read(()).tolist()))
    shape, size = tuple(state["shape"]), state["blocksize"]
    count = math.prod(shape)
    blocks, held = -(-count // size), math.prod(parts["codes"].shape)
    if -(-count // 2) not in (held * width for width in (1, 2, 4)):  # bytes, or wider numbers of several bytes
        raise UnreadableError(f"{module} has {held} packed numbers, which do not fit {list(shape)}")
    expect(parts, module, scales=(blocks,), table=(16,), scale_table=(256,))
    if (parts.keys() >= {"scale_scales", "scale_table"}) != ("nested_blocksize" in state):
        raise UnreadableError(f"the scales of {module} are incomplete")
    if "nested_blocksize" in state:
        expect(parts, module, scale_scales=(-(-blocks // state["nested_blocksize"]),))

    def read() -> Tensor:
        packed = parts["codes"].read(()).reshape(-1).view(torch.uint8)
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)[:count]
        values = parts["table"].read(()).float()[codes.int()]
        return (values * _repeated(_scales(parts, state), size, count)).reshape(shape)

    return matrix(shape, read)


def _scales(parts: Parts, state: dict[str, Any]) -> Tensor:
    """Returns the scale of each block, float32. Nested scales are places in a table of 256, scaled by blocks, too."""
    scales = parts["scales"].read(())
    if "nested_blocksize" not in state:
        return scales.float()
    outer = _repeated(parts["scale_scales"].read(()).float(), state["nested_blocksize"], len(scales))
    return parts["scale_table"].read(()).float()[scales.int()] * outer + state["nested_offset"]


def _repeated(scales: Tensor, size: int, count: int) -> Tensor:
    return scales.repeat_interleave(size)[:count]


def _eight_bits(parts: Parts, settings: Settings, module: str) -> TensorSource:
    """Returns a matrix of int8 numbers, whose scales are the largest absolute weight of each row."""
    shape = parts["codes"].shape
    expect(parts, module, scales=shape[:1])
    if parts["codes"].plain:
        raise UnreadableError(f"{module} has scales, but its weights are not quantised")
    if "format" in parts and int(parts["format"].read(())) != 0:
        raise UnreadableError(f"the weights of {module} are in a GPU's order (weight_format is not 0)")

    def read() -> Tensor:
        return parts["codes"].read(()).float() * parts["scales"].read(()).float().unsqueeze(1) * _PER_127

    return matrix(shape, read)


FOUR_BITS = Method(
    title=lambda settings: f"bitsandbytes, 4 bits ({settings.get('bnb_4bit_quant_type', 'fp4')})",
    endings={
        "scales": ".weight.absmax",
        "codes": ".weight",
        "table": ".weight.quant_map",
        "scale_scales": ".weight.nested_absmax",
        "scale_table": ".weight.nested_quant_map",
        "nf4": ".weight.quant_state.bitsandbytes__nf4",
        "fp4": ".weight.quant_state.bitsandbytes__fp4",
    },
    weight=_four_bits,
    optional=frozenset({"scale_scales", "scale_table", "nf4", "fp4"}),
)

EIGHT_BITS = Method(
    title=lambda settings: "bitsandbytes, 8 bits",
    endings={"scales": ".SCB", "codes": ".weight", "format": ".weight_format"},
    weight=_eight_bits,
    optional=frozenset({"format"}),
)
