"""Method: how a library stores quantised matrices, and the helpers that the methods share."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.checkpoints.checkpoint import Index, TensorSource

Settings = Mapping[str, Any]
"""A quantisation's settings in config.json."""

Parts = Mapping[str, TensorSource]
"""The tensors that a quantised matrix consists of, by role."""


class UnreadableError(Exception):
    """Raised for quantised weights that cannot be read. The message is a clause about the checkpoint."""


@dataclass(frozen=True)
class Method:
    """How a library stores quantised matrices.

    Attributes:
        title: name for the user, from the settings, such as "GPTQ, 4 bits in groups of 128".
        endings: role of each tensor of a matrix, and what follows the module's name in the tensor's name. Every
            quantised module has the first one.
        weight: returns the dequantised matrix, from its tensors, the settings, and the module's name.
        optional: roles that may be absent.
        result: what follows the module's name in the matrix's name.
        check: raises UnreadableError for settings that are unsupported.
        unused: endings of the names of tensors that serve other purposes than the weights.
    """

    title: Callable[[Settings], str]
    endings: Mapping[str, str]
    weight: Callable[[Parts, Settings, str], TensorSource]
    optional: frozenset[str] = frozenset()
    result: str = ".weight"
    check: Callable[[Settings], None] = lambda settings: None
    unused: tuple[str, ...] = ()


def matrix(shape: tuple[int, ...], read: Callable[[], Tensor]) -> TensorSource:
    """Returns a float32 tensor that is dequantised as a whole whenever a part of it is read."""

    def part(index: Index) -> Tensor:
        return read()[index]

    return TensorSource(shape, part)


def expect(parts: Parts, module: str, **shapes: tuple[int, ...]) -> None:
    """Checks the shapes of those of the given parts that are there.

    Raises:
        UnreadableError: one differs.
    """
    for role, shape in shapes.items():
        if role in parts and parts[role].shape != shape:
            raise UnreadableError(f"the {role} of {module} have the shape {list(parts[role].shape)}, not {list(shape)}")


def grouped(settings: Settings) -> str:
    """Describes bits and groups: "4 bits in groups of 128"."""
    size = settings.get("group_size") or -1
    return f"{settings.get('bits', 4)} bits" + (f" in groups of {size}" if size > 0 else "")


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Returns the first `count` unsigned numbers in each row, uint8 [N, count], which are packed from the lowest bit on
    into integers of any size, [N, W]. A number may continue in the next integer.
    """
    stored = words.contiguous().view(torch.uint8)
    first = torch.arange(count) * bits
    byte = first // 8
    codes = stored[:, byte].to(torch.int16)
    if 8 % bits:
        codes |= stored[:, (byte + 1).clamp(max=stored.shape[1] - 1)].to(torch.int16) << 8
    return ((codes >> (first % 8).to(torch.int16)) & ((1 << bits) - 1)).to(torch.uint8)


def word_count(count: int, bits: int) -> int:
    """Returns the number of 32-bit words into which `count` numbers are packed."""
    return math.ceil(count * bits / 32)


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None = None) -> Tensor:
    """Returns scales [A, B], one for each block of a matrix, as float32 that can be multiplied with the matrix.

    Args:
        block: rows and columns of a block; None to divide the matrix evenly. The last blocks may be smaller.
    """
    scales = scales.float().reshape(1, 1) if scales.numel() == 1 else scales.float()
    for dim, size in enumerate(shape):
        if scales.shape[dim] > 1:
            times = block[dim] if block else math.ceil(size / scales.shape[dim])
            scales = scales.repeat_interleave(times, dim).narrow(dim, 0, size)
    return scales


def block_counts(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the number of blocks in each dimension of a matrix. The last blocks may be smaller."""
    return tuple(math.ceil(size / times) for size, times in zip(shape, block, strict=True))


def check_blocks(module: str, scales: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int] | None) -> None:
    """Checks that scales belong to blocks of a matrix, as `spread` takes them.

    Raises:
        UnreadableError: their number is another.
    """
    if block:
        fits = scales == block_counts(shape, block)
    else:
        even = len(scales) == len(shape) and not any(size % have for size, have in zip(shape, scales, strict=True))
        fits = even or math.prod(scales) == 1
    if not fits:
        raise UnreadableError(f"the scales of {module} have the shape {list(scales)}, which does not fit {list(shape)}")
