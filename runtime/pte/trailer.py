"""The trailer: 32 bytes after the program, which show whether a file is complete, undamaged and of a known version."""

import struct
from pathlib import Path
from typing import BinaryIO

import xxhash

from model.errors import InputError
from runtime.pte.metadata import FORMAT_VERSION

_TRAILER = struct.Struct("<8sIIQQ")
_MAGIC = b"llamapte"


class Trailer:
    """The 32 bytes after the program, little-endian: magic "llamapte", format version (uint32), zero (uint32), bytes of
    the program (uint64), XXH3-64 of the program (uint64).
    """

    def __init__(self) -> None:
        self._checksum = xxhash.xxh3_64()
        self._length = 0

    def add(self, piece: bytes) -> None:
        """Adds the next piece of the program."""
        self._checksum.update(piece)
        self._length += len(piece)

    def pack(self) -> bytes:
        """Returns the trailer for the pieces added so far."""
        return _TRAILER.pack(_MAGIC, FORMAT_VERSION, 0, self._length, self._checksum.intdigest())


def check_file(path: Path, *, checksum: bool = True) -> None:
    """Checks that a file is a complete file of llama-pte in the format version that this version reads.

    Args:
        checksum: whether to read the file through and compare its checksum (about 0.1 s per GB in the page cache).

    Raises:
        InputError: it is not; the message names the file, the problem and the fix.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file; export one with `python -m export.llama`")
    size = path.stat().st_size
    with path.open("rb") as stream:
        is_program = stream.read(8)[4:] == b"ET12"
        stream.seek(max(size - _TRAILER.size, 0))
        tail = stream.read()
        magic, version, _, length, digest = _TRAILER.unpack(tail) if len(tail) == _TRAILER.size else (b"", 0, 0, 0, 0)
        if magic != _MAGIC or version == 0:
            if is_program:
                raise InputError(f"{path} is truncated or was not made by llama-pte; copy or export it again")
            raise InputError(f"{path} is not a .pte file; export one with `python -m export.llama`")
        if version < FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version}, but this version reads {FORMAT_VERSION}; export it again"
            )
        if version > FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {version}, newer than this version's {FORMAT_VERSION}; "
                "update llama-pte or export the file again"
            )
        if length != size - _TRAILER.size:
            raise InputError(f"{path} is damaged: it has {size - _TRAILER.size} of {length} bytes; copy it again")
        if checksum:
            stream.seek(0)
            if checksum_of(stream, length) != digest:
                raise InputError(f"{path} is damaged: its checksum does not match; copy or export it again")


def checksum_of(stream: BinaryIO, length: int) -> int:
    """Returns XXH3-64 of the next `length` bytes, or of fewer if the file ends earlier."""
    found, left = xxhash.xxh3_64(), length
    while left > 0 and (piece := stream.read(min(left, 1 << 22))):
        found.update(piece)
        left -= len(piece)
    return found.intdigest()
