"""Lowering of each kind of block to a backend's code, once. Weights are named in the code, so that they can be
replaced.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.utils import is_same_node
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule, get_lowered_submodules
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from export.lowering.backends import BACKENDS, Backend
from export.lowering.export_cache import ExportCache
from export.lowering.patches import known_operators, no_patterns
from export.lowering.slices import sliced
from export.lowering.trace import dynamic_shapes, kinds, parameter_name, trace_piece
from export.weights.formats.float32 import FLOAT
from export.weights.formats.format import Format
from export.weights.scheme import Scheme, swaps_pairs
from export.weights.source import linear_layers
from model.config import ModelConfig
from model.fused_attention import FusedLlama
from model.model import Llama
from model.tensor_parallel import SlicedLlama
from runtime.pte.metadata import MethodSpec, TensorSpec
from runtime.pte.parts import session_methods

NO_CACHE = ExportCache(None)


@dataclass(frozen=True)
class Part:
    """A part of a parameter in a backend's code.

    Attributes:
        key: name in the code: a prefix, and 64 hexadecimal digits.
        parameter: name of the parameter within the piece.
        number: index in the list returned by `Format.parts`.
        nbytes: size of the data, in bytes.
    """

    key: str
    parameter: str
    number: int
    nbytes: int


@dataclass(frozen=True)
class Code:
    """A block or head, lowered for a backend with random weights, for one method.

    Attributes:
        backend_id, payload, compile_specs: the backend's code, in which data is named by its SHA-256.
        arguments: arguments of the code: a number for an argument of the piece, a name for one of its parameters, or a
            constant tensor.
        results: indices of the code's results that the piece returns, in order.
        data: the parameter parts to which the code refers by name.
        stand_in: graph with the code's arguments and results, used where only their shapes matter.
    """

    backend_id: str
    payload: bytes
    compile_specs: list[CompileSpec]
    arguments: tuple[int | str | Tensor, ...]
    results: tuple[int, ...]
    data: tuple["Part", ...]
    stand_in: ExportedProgram


Codes = Mapping[tuple[str, str], Code]
"""Maps (method, kind of `export.lowering.trace.pieces`) to the lowered code."""


@known_operators()
def lower(
    config: ModelConfig,
    shards: Sequence[Sequence[MethodSpec]],
    backend: str,
    scheme: Scheme,
    cache: ExportCache = NO_CACHE,
) -> Codes:
    """Lowers each kind of piece in the shards or slices once. The result is empty if the backend does not work by
    block.

    Args:
        cache: cache from which earlier results are read, and to which new ones are written.
    """
    codes = dict[tuple[str, str], Code]()
    for methods in shards if BACKENDS[backend].by_block else ():
        specs = session_methods(methods)
        first = specs[0]
        part = sliced(config, first.slices)
        for name, kind in kinds(part, first, scheme.careful).items():
            if (first.name, kind) in codes:
                continue
            piece = None
            for spec in specs:
                key = _key(part, spec, backend, scheme) | {"kind": kind}
                entry = cache.get(key)
                if entry is None:
                    piece = piece or _RandomPiece.of(part, first.span, name, scheme)
                    entry = _lowered(trace_piece(part, name, piece.module, spec), BACKENDS[backend], piece)
                    cache.put(key, entry)
                codes[spec.name, kind] = _code(entry, spec)
    is_same_node.cache_clear()  # otherwise it keeps every compared graph, with its weights
    return codes


def to_bytes(tensor: Tensor) -> bytes:
    """Returns the bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()


def delegates(program: ExportedProgram) -> list[LoweredBackendModule]:
    """Returns the parts of a lowered graph that a backend runs."""
    return [module for _, module, _ in get_lowered_submodules(program.graph_module)]


@dataclass(frozen=True)
class _RandomPiece:
    """A piece with random weights.

    Attributes:
        module: the piece.
        formats: format of each of its parameters.
    """

    module: nn.Module
    formats: Mapping[str, Format]

    @staticmethod
    def of(config: ModelConfig, span: range, name: str, scheme: Scheme) -> "_RandomPiece":
        with torch.device("meta"):
            whole: nn.Module = (model := Llama(config, span))
            if name.startswith("segments."):
                whole = FusedLlama(model)
            elif name.startswith(("attend.", "feed.")):
                whole = SlicedLlama(model, 0)
            module = whole.get_submodule(name)
        shapes = {role: parameter.shape for role, parameter in module.named_parameters()}
        formats = dict[str, Format](dict.fromkeys(shapes, FLOAT))
        linear = {path: parameter_name(config, name, f"{path}.weight") for path, _ in linear_layers(module)}
        for path, full in linear.items():
            formats[f"{path}.weight"] = scheme.format(full, shapes[f"{path}.weight"][1])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = {role: formats[role].random(shape) for role, shape in shapes.items()}
        for path, full in linear.items():
            made = formats[f"{path}.weight"].linear(weights[f"{path}.weight"], weights.get(f"{path}.bias"))
            if full == "head.output.weight" and swaps_pairs(config, span, scheme):
                made.register_forward_pre_hook(_swap_pairs)
            module.set_submodule(path, made)
        for role in shapes:
            owner, _, kind = role.rpartition(".")
            if owner not in linear:
                setattr(module.get_submodule(owner), kind, nn.Parameter(weights[role]))
        return _RandomPiece(module.requires_grad_(False).eval(), formats)


def _swap_pairs(_: nn.Module, arguments: tuple[Tensor]) -> Tensor:
    """Swaps columns 0 and 1, 2 and 3 and so on of a linear layer's input. The layer's weight, with its columns swapped
    in the same way and packed as 4-bit pairs, is byte for byte equal to the embedding's.
    """
    (x,) = arguments
    pairs = x.view(*x.shape[:-1], -1, 2)
    return torch.cat((pairs[..., 1:], pairs[..., :1]), dim=-1).view(x.shape)


def _key(config: ModelConfig, spec: MethodSpec, backend: str, scheme: Scheme) -> dict[str, Any]:
    """Returns the part of a cache key that does not depend on the kind of piece."""
    return {
        "config": dataclasses.asdict(config),
        "method": dataclasses.asdict(spec),
        "backend": backend,
        "scheme": scheme.to_json(),
    }


def _lowered(graph: ExportedProgram, backend: Backend, piece: _RandomPiece) -> dict[str, Any]:
    """Lowers a graph and returns the content of its `Code`, as plain values and tensors for the cache."""
    with no_patterns():
        lowered = to_edge_transform_and_lower(graph, partitioner=backend.partitioners()).exported_program()
    (delegate,) = delegates(lowered)
    call: Any = next(node for node in lowered.graph.nodes if node.target is executorch_call_delegate)
    results: Any = lowered.graph.output_node().args[0]
    inputs, rows = list(lowered.graph_signature.user_inputs), _rows(graph)
    return {
        "backend_id": delegate.backend_id,
        "payload": torch.frombuffer(bytearray(delegate.processed_bytes), dtype=torch.uint8),
        "compile_specs": [(spec.key, bytes(spec.value).hex()) for spec in delegate.compile_specs],
        "arguments": [_argument(lowered, node, inputs) for node in call.args[1:]],
        "results": [result.args[1] for result in results],
        "data": [dataclasses.astuple(part) for part in _data(delegate, piece)],
        "takes": [_shape(node.meta["val"], rows) for node in call.args[1:]],
        "gives": [_shape(value, rows) for value in call.meta["val"]],
    }


def _code(entry: Mapping[str, Any], spec: MethodSpec) -> Code:
    """Returns the code from a result of `_lowered`."""
    return Code(
        backend_id=entry["backend_id"],
        payload=to_bytes(entry["payload"]),
        compile_specs=[CompileSpec(key, bytes.fromhex(value)) for key, value in entry["compile_specs"]],
        arguments=tuple(entry["arguments"]),
        results=tuple(entry["results"]),
        data=tuple(Part(*fields) for fields in entry["data"]),
        stand_in=_stand_in(entry["takes"], entry["gives"], spec),
    )


def _argument(program: ExportedProgram, node: Node, inputs: list[str]) -> int | str | Tensor:
    if node.name in inputs:
        return inputs.index(node.name)
    signature = program.graph_signature
    if node.name in signature.inputs_to_parameters:
        return signature.inputs_to_parameters[node.name].removeprefix("module.")
    constant = (signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants)[node.name]
    return program.state_dict.get(constant, program.constants.get(constant))


def _data(delegate: LoweredBackendModule, piece: _RandomPiece) -> tuple[Part, ...]:
    """Finds the parts of every parameter in the code, by their content."""
    stored = delegate.named_data_store_output.pte_data
    found = []
    for name, parameter in piece.module.named_parameters():
        for number, (prefix, data) in enumerate(piece.formats[name].parts(parameter)):
            key = prefix + hashlib.sha256(to_bytes(data)).hexdigest()
            if key in stored:
                found.append(Part(key, name, number, data.nbytes))
    assert {part.key for part in found} == stored.keys(), "the backend changed a weight, so its code fits no other"
    return tuple(found)


class _Shapes(nn.Module):
    """A module that returns empty tensors of the given specs, with sizes taken from the arguments."""

    def __init__(self, arguments: list[TensorSpec], results: list[TensorSpec]) -> None:
        super().__init__()
        self.results = results
        found = ((number, spec.shape.index("R")) for number, spec in enumerate(arguments) if "R" in spec.shape)
        self.rows = next(found, None)

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        rows = arguments[self.rows[0]].shape[self.rows[1]] if self.rows else 1
        return tuple(arguments[0].new_empty(result.sizes(arguments[0].shape[1], rows)) for result in self.results)


def _stand_in(takes: Sequence[Any], gives: Sequence[Any], spec: MethodSpec) -> ExportedProgram:
    arguments, results = ([TensorSpec("", tuple(size), dtype) for size, dtype in found] for found in (takes, gives))
    return torch.export.export(
        _Shapes(arguments, results),
        tuple(argument.zeros(spec.max_length, spec.max_rows) for argument in arguments),
        dynamic_shapes=dynamic_shapes("arguments", arguments, spec),
    )


def _rows(graph: ExportedProgram) -> str | None:
    """Returns the symbol for the number of rows in a head's graph, or None. Only `select` has a last dimension that is
    not fixed, and its second dimension is the number of rows.
    """
    inputs = set(graph.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in graph.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return next((str(shape[1]) for shape in shapes if not isinstance(shape[-1], int)), None)


def _shape(value: Tensor, rows: str | None) -> tuple[list[int | str], str]:
    """Returns sizes and dtype. A size that is not fixed is "R" for the symbol `rows`, otherwise "L", the length of the
    step.
    """
    sizes: list[int | str] = [
        size if isinstance(size, int) else "R" if str(size) == rows else "L" for size in value.shape
    ]
    return sizes, str(value.dtype).removeprefix("torch.")
