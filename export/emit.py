"""emit: lowered programs and their metadata become one file, which appears whole or not at all."""

import fcntl
import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
from executorch.exir.passes import MemoryPlanningPass

from export.link import Linked
from export.metadata import Metadata, Trailer, to_constants
from model.errors import InputError


def emit(linked: Linked, metadata: Metadata, path: Path) -> None:
    """Writes program, metadata and trailer to `path`.

    Inputs and outputs of the methods are not memory-planned: the runtime points them at buffers of its own.
    """
    edge = linked.edge
    programs = {name: edge.exported_program(name) for name in edge.methods}
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    program = EdgeProgramManager(programs, to_constants(metadata), edge.compile_config).to_executorch(
        ExecutorchBackendConfig(memory_planning_pass=planning)
    )
    with path.open("wb") as stream:
        checked = _Checked(stream)
        program.write_to_file(checked)
        stream.write(checked.trailer.pack())


class _Checked:
    """A stream that works out the trailer while it is written to."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.trailer = Trailer()

    def write(self, piece: bytes) -> int:
        self.trailer.add(piece)
        return self._stream.write(piece)


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
