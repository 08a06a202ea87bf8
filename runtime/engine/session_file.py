"""The file format of a saved session, the same in Python and C++: the text's ids and its caches.

Little-endian: magic "llamakvs", version (uint32), zero (uint32), the model's identity (16 bytes, see
`runtime.pte.metadata.Metadata.identity`), position and first (int64 each, see `KVCache.state`), the text's ids (int64
each), the filled rows of every cache in the order of the method's inputs, and XXH3-64 of all that (uint64).
"""

import os
import struct
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from model.errors import InputError
from runtime.atomic_file import replacing
from runtime.pte.trailer import checksum_of

VERSION = 1
_MAGIC = b"llamakvs"
_HEADER = struct.Struct("<8sII16sqq")
_CHECKSUM = struct.Struct("<Q")


def write(
    path: Path, identity: bytes, state: tuple[int, int], tokens: Sequence[int], rows: Sequence[np.ndarray]
) -> None:
    """Writes a session file completely, or leaves the earlier file unchanged.

    Raises:
        InputError: the file cannot be written.
    """
    header, heads = _HEADER.pack(_MAGIC, VERSION, 0, identity, *state), (head for each in rows for head in each)
    checksum = xxhash.xxh3_64()
    with replacing(path) as temporary, temporary.open("wb") as stream:
        for piece in chain((header, np.asarray(tokens, "<i8").tobytes()), (head.tobytes() for head in heads)):
            checksum.update(piece)
            stream.write(piece)
        stream.write(_CHECKSUM.pack(checksum.intdigest()))


def read(
    path: Path, identity: bytes, capacity: int, restore: Callable[[tuple[int, int]], Sequence[np.ndarray]]
) -> list[int]:
    """Reads a session file. Nothing is restored unless the whole file is correct.

    Args:
        identity: identity of the model for which the file must be.
        capacity: maximum number of tokens in the text.
        restore: takes the state, and returns the arrays to fill.

    Returns:
        the text's ids.

    Raises:
        InputError: the file is no session file, is damaged, or is for another model.
    """
    try:
        with path.open("rb") as stream:
            state = _checked_header(stream, path, identity, capacity)
            tokens = np.frombuffer(stream.read(8 * state[0]), "<i8").tolist()
            for each in restore(state):
                for head in each:
                    head[...] = np.frombuffer(stream.read(head.nbytes), head.dtype).reshape(head.shape)
            return tokens
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a saved session") from error


def _checked_header(stream: BinaryIO, path: Path, identity: bytes, capacity: int) -> tuple[int, int]:
    """Checks the file and returns the state; the stream is then at the ids."""
    size = os.fstat(stream.fileno()).st_size
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise InputError(f"{path} is not a saved session; give one")
    _, version, _, whose, position, first = _HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"{path} has version {version}, but this program reads {VERSION}; save the session again")
    if whose != identity:
        raise InputError(f"{path} was saved with another model; give the .pte that it was made with")
    stream.seek(0)
    found = checksum_of(stream, size - _CHECKSUM.size)
    if stream.read() != _CHECKSUM.pack(found) or not 0 <= position <= capacity:
        raise InputError(f"{path} is damaged: its checksum does not match; save the session again")
    stream.seek(_HEADER.size)
    return position, first
