"""Writing of lowered programs and their metadata to one file."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
from executorch.exir.passes import MemoryPlanningPass
from flatbuffers.table import Table  # type: ignore[import-untyped]

from export.lowering.assemble import Assembled
from export.lowering.lower import to_bytes
from runtime.pte.metadata import Metadata, to_constants
from runtime.pte.trailer import Trailer


def write_program(assembled: Assembled, metadata: Metadata, path: Path) -> None:
    """Writes the program, its metadata and the trailer to `path`.

    Memory for the inputs and outputs of the methods is not planned, because the runtime provides its own buffers.
    """
    edge = assembled.edge
    programs = {name: edge.exported_program(name) for name in edge.methods}
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    program = EdgeProgramManager(programs, to_constants(metadata), edge.compile_config).to_executorch(
        ExecutorchBackendConfig(memory_planning_pass=planning)
    )
    constants = [buffer.storage for buffer in program.executorch_program.constant_buffer]
    shared = {key: (constants.index(to_bytes(tensor)), tensor.nbytes) for key, tensor in assembled.shared.items()}
    with path.open("wb") as stream:
        checked = _Checked(stream, lambda piece: _sharing(piece, shared))
        program.write_to_file(checked)
        stream.write(checked.trailer.pack())


_SEGMENTS, _CONSTANTS, _NAMED = 4, 5, 7
"""Field numbers of a program, in the order of executorch/schema/program.fbs."""


def _sharing(program: bytes, shared: Mapping[str, tuple[int, int]]) -> bytes:
    """Returns the first piece of a file, which contains everything but the data, changed so that named data refers to
    the bytes of a constant in the file.

    Args:
        shared: maps the name of the data to the constant's number and size.
    """
    made = bytearray(program)
    root = Table(made, *struct.unpack_from("<I", made))

    def field(table: Table, number: int) -> int:
        """Returns the offset at which a field starts."""
        return int(table.Pos + table.Offset(4 + 2 * number))

    def item(table: Table, number: int, index: int) -> Table:
        return Table(made, table.Indirect(table.Vector(table.Offset(4 + 2 * number)) + 4 * index))

    constants = Table(made, root.Indirect(field(root, _CONSTANTS)))  # the first segment, so it starts at 0
    offsets = constants.Vector(constants.Offset(6))
    for index in range(root.VectorLen(root.Offset(4 + 2 * _NAMED)) if shared else 0):
        data = item(root, _NAMED, index)
        if found := shared.get(data.String(field(data, 0)).decode()):
            number, size = found
            segment = item(root, _SEGMENTS, *struct.unpack_from("<I", made, field(data, 1)))
            (offset,) = struct.unpack_from("<Q", made, offsets + 8 * number)
            struct.pack_into("<Q", made, field(segment, 0), offset)
            struct.pack_into("<Q", made, field(segment, 1), size)
    return bytes(made)


class _Checked:
    """A stream that computes the trailer from the data written to it."""

    def __init__(self, stream: BinaryIO, program: Callable[[bytes], bytes]) -> None:
        """Takes the output stream, and a function that is applied to the first piece written, which contains everything
        but the data.
        """
        self._stream = stream
        self._program: Callable[[bytes], bytes] | None = program
        self.trailer = Trailer()

    def write(self, piece: bytes) -> int:
        if self._program:
            piece, self._program = self._program(piece), None
        self.trailer.add(piece)
        return self._stream.write(piece)
