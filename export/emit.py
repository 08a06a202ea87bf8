"""emit: lowered programs and their metadata become one file, which appears whole or not at all."""

import fcntl
import glob
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
from executorch.exir.passes import MemoryPlanningPass
from flatbuffers.table import Table  # type: ignore[import-untyped]

from export.link import Linked
from export.lower import to_bytes
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
    constants = [buffer.storage for buffer in program.executorch_program.constant_buffer]
    shared = {key: (constants.index(to_bytes(tensor)), tensor.nbytes) for key, tensor in linked.shared.items()}
    with path.open("wb") as stream:
        checked = _Checked(stream, lambda piece: _sharing(piece, shared))
        program.write_to_file(checked)
        stream.write(checked.trailer.pack())


SEGMENTS, _CONSTANTS, NAMED = 4, 5, 7
"""Fields of a program in the order of executorch/schema/program.fbs."""


def _sharing(program: bytes, shared: Mapping[str, tuple[int, int]]) -> bytes:
    """The first piece of a file, all but its data, in which named data is the same bytes of the file as a constant.

    Args:
        shared: name -> the constant's number and size.
    """
    made = bytearray(program)
    root = Table(made, *struct.unpack_from("<I", made))

    def field(table: Table, number: int) -> int:
        """Where it starts."""
        return int(table.Pos + table.Offset(4 + 2 * number))

    def item(table: Table, number: int, index: int) -> Table:
        return Table(made, table.Indirect(table.Vector(table.Offset(4 + 2 * number)) + 4 * index))

    constants = Table(made, root.Indirect(field(root, _CONSTANTS)))  # these are the first segment, so they start at 0
    offsets = constants.Vector(constants.Offset(6))
    for index in range(root.VectorLen(root.Offset(4 + 2 * NAMED)) if shared else 0):
        data = item(root, NAMED, index)
        if found := shared.get(data.String(field(data, 0)).decode()):
            number, size = found
            segment = item(root, SEGMENTS, *struct.unpack_from("<I", made, field(data, 1)))
            (offset,) = struct.unpack_from("<Q", made, offsets + 8 * number)
            struct.pack_into("<Q", made, field(segment, 0), offset)
            struct.pack_into("<Q", made, field(segment, 1), size)
    return bytes(made)


class _Checked:
    """A stream that works out the trailer while it is written to."""

    def __init__(self, stream: BinaryIO, program: Callable[[bytes], bytes]) -> None:
        """Takes what becomes of the first piece, which is all but the data."""
        self._stream = stream
        self._program: Callable[[bytes], bytes] | None = program
        self.trailer = Trailer()

    def write(self, piece: bytes) -> int:
        if self._program:
            piece, self._program = self._program(piece), None
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
