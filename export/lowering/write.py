"""Writing of lowered programs and their metadata to one file."""

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig, ExecutorchProgramManager, schema
from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program
from executorch.exir.passes import MemoryPlanningPass

from export.lowering.assemble import Assembled, Deferred
from export.lowering.lower import to_bytes
from runtime.pte.metadata import Metadata, to_constants
from runtime.pte.trailer import Trailer


def write_program(
    assembled: Assembled,
    metadata: Metadata,
    path: Path,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the program, its metadata and the trailer to `path`.

    Memory for the inputs and outputs of the methods is not planned, because the runtime provides its own buffers.

    Args:
        advance: receives the number of bytes of the program that are written, and of all its bytes.
    """
    edge = assembled.edge
    programs = {name: edge.exported_program(name) for name in edge.methods}
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    config = ExecutorchBackendConfig(memory_planning_pass=planning)
    manager = EdgeProgramManager(programs, to_constants(metadata), edge.compile_config)
    for key in assembled.deferred:  # names, by which verification finds the matrices
        manager._named_data_store.add_named_data(key.hex(), key)
    program = manager.to_executorch(config)
    constants = [buffer.storage for buffer in program.executorch_program.constant_buffer]
    shared = {key: (constants.index(to_bytes(tensor)), tensor.nbytes) for key, tensor in assembled.shared.items()}
    shared |= {key.hex(): (constants.index(key), len(matrix)) for key, matrix in assembled.deferred.items()}
    with path.open("wb") as stream:
        if assembled.deferred:
            _with_matrices(program, assembled.deferred, replace(config, constant_tensor_alignment=_ALIGNMENT))
        total = len(program._pte_data)
        checked = _Checked(stream, lambda piece: _sharing(piece, shared), lambda done: advance(done, total))
        program.write_to_file(checked)
        stream.write(checked.trailer.pack())


_ALIGNMENT = 64
"""Alignment of constants that are matrices, in bytes: a cache line."""


def _with_matrices(
    program: ExecutorchProgramManager, deferred: Mapping[bytes, Deferred], config: ExecutorchBackendConfig
) -> None:
    """Puts matrices in place of the constants that stand in for them, see `Assembled.deferred`, and serialises the
    program again. The matrices are read only when it is written.
    """
    tables, matrices = program.executorch_program, dict[int, Deferred]()
    for number, buffer in enumerate(tables.constant_buffer):
        if matrix := deferred.get(buffer.storage):
            buffer.storage, matrices[number] = matrix, matrix
    for plan in tables.execution_plan:
        for value in plan.values:
            if isinstance(value.val, schema.Tensor) and value.val.data_buffer_idx in matrices:
                value.val.sizes = [len(matrices[value.val.data_buffer_idx])]
    program._pte_data, _ = serialize_for_executorch(
        program._emitter_output, config, program._data_serializer, program._named_data
    )


_OFFSET, _SIZE = 4, 6
"""The places of DataSegment's fields in its table of fields, as in the generated DataSegment.py."""


def _sharing(program: bytes, shared: Mapping[str, tuple[int, int]]) -> bytes:
    """Returns the first piece of a file, which contains everything but the data, changed so that named data refers to
    the bytes of a constant in the file.

    It is changed in place and not written anew, because ExecuTorch's writer leaves out an offset that is 0: the piece
    would become shorter, and its header wrong.

    Args:
        shared: maps the name of the data to the constant's number and size.
    """
    if not shared:
        return program
    _patch_generated_flatbuffer_aliases()
    made = bytearray(program)
    tables = Program.GetRootAs(made)
    for index in range(tables.NamedDataLength()):
        data = tables.NamedData(index)
        if found := shared.get(data.Key().decode()):
            number, size = found
            segment = tables.Segments(data.SegmentIndex())._tab
            offset = tables.ConstantSegment().Offsets(number)  # in the first segment, which starts at 0
            for field, value in ((_OFFSET, offset), (_SIZE, size)):
                struct.pack_into("<Q", made, segment.Pos + segment.Offset(field), value)
    return bytes(made)


class _Checked:
    """A stream that computes the trailer from the data written to it."""

    def __init__(self, stream: BinaryIO, program: Callable[[bytes], bytes], written: Callable[[int], None]) -> None:
        """Takes the output stream; a function that is applied to the first piece written, which contains everything
        but the data; and a function that receives the number of bytes written so far.
        """
        self._stream, self._written = stream, written
        self._program: Callable[[bytes], bytes] | None = program
        self.trailer = Trailer()

    def write(self, piece: bytes) -> int:
        if self._program:
            piece, self._program = self._program(piece), None
        self.trailer.add(piece)
        count = self._stream.write(piece)
        self._written(self._stream.tell())
        return count
