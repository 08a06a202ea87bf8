"""A file that appears whole or not at all."""

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
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, which takes its place when the block ends well and vanishes otherwise.

    What a killed process left behind is removed by the next one: a temporary file whose lock is free has no owner.

    Raises:
        InputError: nothing can be written there.
    """
    if path.is_dir():
        raise InputError(f"--output {path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise InputError(f"--output {path} is no ordinary file; give the name of one")
    with _temporary_beside(path) as owner:
        temporary = Path(owner.name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        except OSError as error:
            raise InputError(f"--output {path} cannot be written ({error.strerror}); make room there") from error
        finally:
            temporary.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> "tempfile._TemporaryFileWrapper[bytes]":
    """A locked temporary file. The folder is locked meanwhile, so that no other export takes it for a leftover."""
    prefix, suffix = f".{path.name}.", ".partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            for leftover in path.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
                with suppress(FileNotFoundError), leftover.open("rb") as stream:  # its owner may just have finished
                    if _locked(stream):
                        leftover.unlink()
            owner = tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, suffix=suffix, delete=False)  # noqa: SIM115
            _locked(owner)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(f"--output {path} cannot be written ({error.strerror}); give a place that can") from error
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
