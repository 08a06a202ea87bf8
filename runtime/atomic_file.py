"""Atomic replacement of a file: it is written completely or not changed at all."""

import fcntl
import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from model.errors import InputError


@contextmanager
def replacing(path: Path, flag: str = "") -> Iterator[Path]:
    """Yields the path of a temporary file beside `path`, which replaces `path` if the block succeeds and is deleted
    otherwise.

    A temporary file left by a killed process is deleted by the next call for the same path: it is recognised by its
    lock, which no process holds.

    Args:
        flag: the flag that gave the path, which messages then name.

    Raises:
        InputError: no file can be written at `path`.
    """
    name = f"{flag} {path}".lstrip()
    if path.is_dir():
        raise InputError(f"{name} is a folder; give a file name")
    if path.exists() and not path.is_file():
        raise InputError(f"{name} is not a regular file; give another file name")
    with _temporary_beside(path, name) as owner:
        temporary = Path(owner.name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError as error:
            raise InputError(
                f"{name} cannot be written ({error.strerror}); free some space or give another folder"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _temporary_beside(path: Path, name: str) -> "tempfile._TemporaryFileWrapper[bytes]":
    """Creates and locks a temporary file beside `path`. The folder is locked meanwhile, so that no other process
    deletes the new file as a leftover before it is locked.
    """
    prefix, suffix = f".{path.name}.", ".partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            for leftover in path.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
                with suppress(FileNotFoundError), leftover.open("rb") as stream:  # its owner may delete it meanwhile
                    if _locked(stream):
                        leftover.unlink()
            owner = tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, suffix=suffix, delete=False)  # noqa: SIM115
            _locked(owner)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(f"{name} cannot be written ({error.strerror}); give another path") from error
    return owner


def _locked(stream: IO[bytes]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
