"""Assembly of a model from lowered blocks with their weights, and tracing of the result as a whole."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import IO, Any, cast

import torch
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize.data_serializer import DataEntry
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.operator.convert import to_out_variant
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from export.lowering.backends import BACKENDS, partitioners, quietly
from export.lowering.code import Code, Delegate, Value
from export.lowering.lower import Codes, delegates, to_bytes
from export.lowering.patches import known_operators
from export.lowering.slices import SlicedSource
from export.lowering.trace import kinds, parameter_name, trace
from export.weights.scheme import is_shared
from export.weights.source import WeightSource, embedding_names, piece_names
from runtime.pte.metadata import MethodSpec, Requirements
from runtime.pte.parts import session_methods


@dataclass(frozen=True)
class Assembled:
    """Programs ready to be written.

    Attributes:
        edge: the lowered programs.
        requirements: backends and operators that a runtime needs to run them.
        delegates: number of parts of the programs that a backend runs.
        shared: maps the name of a backend's data to the constant of the programs with the same bytes.
        deferred: maps the bytes of a constant that stands in for a matrix to the matrix.
    """

    edge: EdgeProgramManager
    requirements: Requirements
    delegates: int
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    deferred: Mapping[bytes, "Deferred"] = field(default_factory=dict)


@known_operators()
def assemble(
    source: WeightSource,
    methods: Sequence[MethodSpec],
    codes: Codes,
    backend: str,
    identity: str,
) -> Assembled:
    """Assembles the methods of a shard or slice. Weights of lowered pieces stay on storage until the file is written.

    Args:
        identity: string that differs between exports if any weight may differ. XNNPACK treats weights with the same
            name as equal, in all files that a process has open.
    """
    programs = dict[str, ExportedProgram]()
    first, *_ = session_methods(methods)
    span, fused = first.span, first.is_fused
    source, identity = part_of(source, identity, first)
    by_kind = kinds(source.config, first, source.scheme) if codes else {}
    data = _Data(source, identity, BACKENDS[backend].alignment)
    others = {name: data.piece(name) for name in (embedding_names if codes else piece_names)(source.config, span)}
    for spec in session_methods(methods):
        made = others | {name: LoweredPiece(name, codes[spec.name, kind], data) for name, kind in by_kind.items()}
        if isinstance(source, SlicedSource):
            programs |= trace(source.sliced(made), methods)
        else:
            programs |= trace(source.fused(made, span) if fused else source.model(made, span), [spec])
    with quietly():
        partitioner = [] if codes else partitioners(backend)
        edge = to_edge_transform_and_lower(programs, partitioner=dict.fromkeys(programs, partitioner))
    finished = [edge.exported_program(name) for name in programs]
    return Assembled(
        edge,
        Requirements(
            executorch=version("executorch"),
            backends=tuple(sorted({module.backend_id for program in finished for module in delegates(program)})),
            operators=tuple(sorted({name for program in finished for name in operators(program)})),
        ),
        delegates=sum(len(delegates(program)) for program in finished),
        shared=data.shared,
        deferred=data.deferred,
    )


def part_of(source: WeightSource, identity: str, method: MethodSpec) -> tuple[WeightSource, str]:
    """Returns the weight source and identity for a method's slice; those of the whole model if the method is not
    sliced.
    """
    if method.slices == 1:
        return source, identity
    return SlicedSource(source, method.slice, method.slices), f"{identity} {method.slice}"


def operators(program: ExportedProgram) -> Iterator[str]:
    """Yields the names of the kernels that a lowered graph calls outside its delegates, such as
    `aten::embedding.out`.
    """
    for node in program.graph.nodes:
        operator = getattr(node.target, "_op", None)  # operators on sizes are Python's and part of every runtime
        if node.op == "call_function" and isinstance(operator, OpOverload):
            out, _ = to_out_variant(operator)
            yield f"{out._schema.name}.{out._schema.overload_name}"


class LoweredPiece(nn.Module):
    """A block or head as lowered code, with the same arguments and results as the original module."""

    def __init__(self, name: str, code: Code, data: "_Data") -> None:
        """Copies `code` and gives the copy the weights of the piece `name`."""
        super().__init__()
        self.code = code
        self.delegates = nn.ModuleList(_with_weights(name, delegate, data) for delegate in code.delegates)
        for number, call in enumerate(code.calls):
            for index, argument in enumerate(call.arguments):
                self._keep(f"constant_{number}_{index}", argument, functools.partial(data.argument, name))

    def _keep(self, place: str, argument: Value, read: Callable[[str], Tensor]) -> None:
        """Registers the tensors that an argument stands for, in buffers named after its place."""
        if argument.kind == "list":
            for index, each in enumerate(argument.value):
                self._keep(f"{place}_{index}", each, read)
        elif argument.kind == "parameter":
            self.register_buffer(place, read(argument.value))
        elif isinstance(argument.value, Tensor):
            self.register_buffer(place, argument.value)

    def forward(self, *arguments: object) -> tuple[Tensor, ...]:
        given = [argument for argument in tree_leaves(arguments) if argument is not None]
        made, delegates = list[Any](), iter(self.delegates)

        def value(kind: str, found: Any, place: str = "") -> Any:
            if kind == "input":
                return given[found]
            if kind == "list":
                return [value(each[0], each[1], f"{place}_{index}") for index, each in enumerate(found)]
            if kind == "result":
                call, index = found
                return made[call] if index is None else made[call][index]
            return getattr(self, place, found)

        for number, call in enumerate(self.code.calls):
            run = next(delegates) if isinstance(call.target, Delegate) else _operator(call.target)
            made.append(run(*(value(*each, f"constant_{number}_{i}") for i, each in enumerate(call.arguments))))
        return tuple(value(*each) for each in self.code.results)


def _operator(name: str) -> Callable[..., Any]:
    """Returns an operator by its name, such as llama_pte.linear.default."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return cast(Callable[..., Any], found)


class _Data:
    """The data of a file's weights, produced only when it is requested.

    Attributes:
        shared, deferred: see `Assembled`.
    """

    def __init__(self, source: WeightSource, identity: str, alignment: int) -> None:
        self.source = source
        self.identity = identity
        self.alignment = alignment
        self.shared = dict[str, Tensor]()
        self.deferred = dict[bytes, Deferred]()
        self._embedding: list[Tensor] | None = None
        self._last: tuple[str, list[Tensor]] = ("", [])

    def piece(self, name: str) -> nn.Module:
        """Returns a part of the model that is not lowered by itself, with its weights as constants. The embedding comes
        before the head.
        """
        if name != "tok_embeddings":
            return self.source.piece(name)
        form = self.source.format(f"{name}.weight")
        if form.by_operator:
            self._embedding = []
            return form.embedding(self.stand_in(f"{name}.weight"), self.source.config.dim)
        piece = self.source.piece(name)
        self._embedding = list(piece.state_dict().values())
        return piece

    def argument(self, piece: str, role: str) -> Tensor:
        """Returns a parameter of a piece that is an argument of a call."""
        name = parameter_name(self.source.config, piece, role)
        return self.stand_in(name) if self.source.format(name).by_operator else self.source.weight(name).float()

    def stand_in(self, name: str) -> Tensor:
        """Returns a small constant that stands in for a matrix until the file is written. Its bytes say which."""
        if name == "head.output.weight" and self._is_shared:
            name = "tok_embeddings.weight"
        digest = weight_digest(self.identity, name, 0)
        nbytes = self.source.format(name).nbytes(*self.source.matrices[name])
        self.deferred[bytes.fromhex(digest)] = Deferred(digest, nbytes, functools.partial(self.part, name, 0))
        return torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)

    def constant(self, name: str, number: int, nbytes: int) -> Tensor | None:
        """Returns the embedding's tensor that has the same bytes as a part of a parameter, or None if there is none."""
        if name != "head.output.weight" or not self._is_shared or not self._embedding:
            return None
        constant = self._embedding[number]
        return constant if constant.nbytes == nbytes else None

    @property
    def _is_shared(self) -> bool:
        return self._embedding is not None and is_shared(self.source.config, self.source.scheme)

    def part(self, name: str, number: int) -> bytes:
        """Returns the bytes of one part of a parameter. The parts of the last parameter are kept, because a parameter's
        parts are requested consecutively.
        """
        if self._last[0] != name:
            self._last = (name, [data for _, data in self.source.parts(name)])
        return to_bytes(self._last[1][number])


def _with_weights(name: str, code: Delegate, data: _Data) -> LoweredBackendModule:
    """Copies a delegate, with a unique name for each weight. The weights themselves are read when the file is
    written.
    """
    payload, buffers, entries = code.payload, list[Deferred](), dict[str, DataEntry]()
    for part in code.data:
        parameter = parameter_name(data.source.config, name, part.parameter)
        digest = weight_digest(data.identity, parameter, part.number)
        key = part.key[:-64] + digest
        assert payload.count(part.key.encode()) == 1, f"the code does not name {part.parameter} once"
        payload = payload.replace(part.key.encode(), key.encode())
        entries[key] = DataEntry(len(buffers), data.alignment, None)
        constant = data.constant(parameter, part.number, part.nbytes)
        if constant is None:
            make = functools.partial(data.part, parameter, part.number)
            buffers.append(Deferred(key, part.nbytes, make))
        else:
            data.shared[key] = constant
            buffers.append(Deferred(key, 1, lambda: bytes(1)))  # placeholder until the file is written
    store = NamedDataStoreOutput(buffers, entries, {})
    return LoweredBackendModule(code.stand_in, code.backend_id, payload, code.compile_specs, store)


def weight_digest(identity: str, parameter: str, number: int) -> str:
    """Returns the digest that ends the name of a part of a parameter in the file."""
    return hashlib.sha256(f"{identity} {parameter}.{number}".encode()).hexdigest()


class Deferred(FileBackedData):  # type: ignore[misc]  # ExecuTorch's exir is not typed
    """Data of a known size that is produced when the file is written, and not kept."""

    def __init__(self, identity: str, size: int, make: Callable[[], bytes]) -> None:
        self._identity = hashlib.sha256(identity.encode()).digest()
        self._size = size
        self._make = make

    def __len__(self) -> int:
        return self._size

    def __deepcopy__(self, _: object) -> "Deferred":
        """Returns the same object, because ExecuTorch copies a program before it serialises it."""
        return self

    def prefix(self, size: int) -> bytes:
        """Returns a substitute for the first bytes in comparisons of data: the digest of the name, equal only for equal
        names.
        """
        return self._identity[:size]

    def sha256(self) -> bytes:
        """Returns a substitute for the digest of the data, like `prefix`."""
        return self._identity

    def to_bytes(self) -> bytes:
        made = self._make()
        assert len(made) == self._size, f"{len(made)} bytes were made where {self._size} were announced"
        return made

    def write_to_file(self, outfile: IO[bytes]) -> None:
        outfile.write(self.to_bytes())

    def close(self) -> None:
        """Does nothing, because no file is open."""
