"""Parser of the GGUF format, versions 2 and 3 (ggml-org/ggml, docs/gguf.md): fields, and the location of each tensor.

The gguf package is not used for this, because it takes ten seconds to list the 400,000 strings of a Llama 3 vocabulary.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from model.errors import InputError

MAGIC = b"GGUF"

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
"""Types of a field's value; for numbers, with the letter of the struct module."""


_REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"} | {
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Tensor types that were removed from ggml (ggml-org/ggml, include/ggml.h)."""


def _kind(number: int) -> GGMLQuantizationType:
    """Returns the tensor type of a number.

    Raises:
        InputError: the type has been removed from ggml.
        ValueError: the number is not a known type.
    """
    if number in _REMOVED:
        raise InputError(
            f"a tensor is stored as {_REMOVED[number]} (type {number}), which GGUF no longer has; "
            "give a file with another quantisation"
        )
    return GGMLQuantizationType(number)


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's shape, outermost dimension first, and the location and type of its values in the file. Several
    matrices in one tensor have the shape of one matrix with the rows of all.
    """

    path: Path
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def size(self) -> int:
        """Size on storage, in bytes."""
        per_block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // per_block * block_bytes

    def blocks(self) -> np.ndarray:
        """Returns the bytes of each row, uint8."""
        data = np.memmap(self.path, np.uint8, mode="c", offset=self.offset, shape=(self.size,))
        return data.reshape(*self.shape[:-1], -1)

    def read(self, rows: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the values as float32, or some rows of a matrix, or some values of a vector."""
        if len(self.shape) == 1:  # its values are not rows of blocks
            return np.ascontiguousarray(dequantize(self.blocks(), self.kind)[rows], dtype=np.float32)
        return np.ascontiguousarray(dequantize(self.blocks()[rows], self.kind), dtype=np.float32)


@dataclass(frozen=True)
class GGUFFile:
    """The content of a GGUF file: fields and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Reads everything except the values of tensors.

    Raises:
        InputError: a tensor's type has been removed from ggml.
        ValueError: the file is truncated, damaged, or of another version.
    """
    with path.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
        return _parsed(path, _Cursor(data))


def _parsed(path: Path, cursor: "_Cursor") -> GGUFFile:
    magic, version = cursor.take(4), cursor.number("I")
    if magic != MAGIC or version not in (2, 3):
        raise ValueError(f"it starts with {magic!r} and version {version}")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    fields = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(n_fields)}
    found = [(cursor.string(), *cursor.tensor()) for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {name: GGUFTensor(path, shape, kind, start + offset) for name, shape, kind, offset in found}
    for name, tensor in tensors.items():
        if len(tensors) != n_tensors or tensor.offset + tensor.size > cursor.size:
            raise ValueError(f"{name} is in it twice or ends after its {cursor.size} bytes")
    return GGUFFile(fields, tensors)


class _Cursor:
    """Reads consecutive values from the file."""

    def __init__(self, data: mmap) -> None:
        self._data = data
        self.size = len(data)
        self.offset = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.offset:
            raise ValueError(f"it ends at byte {self.size}, inside a value")
        self.offset += count
        return self._data[self.offset - count : self.offset]

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter)))

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        """Returns a field's value; arrays become lists."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 4:
            raise ValueError(f"it has a value of the unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in _NUMBERS:
            return list(self.numbers(_NUMBERS[item], count))
        read: Callable[[], Any] = self.string if item == _STRING else lambda: self.value(item, depth + 1)
        return [read() for _ in range(count)]

    def tensor(self) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
        """Returns a tensor's shape, type, and offset from the end of the header. GGUF lists dimensions from the
        innermost; the result is reversed.
        """
        shape = self.numbers("Q", self.number("I"))[::-1]
        kind, offset = _kind(self.number("I")), self.number("Q")
        if not 0 < math.prod(shape) < 1 << 48 or not shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"it has a tensor of the invalid shape {list(shape)}")
        return (math.prod(shape[:-1]), shape[-1])[-len(shape) :], kind, offset
