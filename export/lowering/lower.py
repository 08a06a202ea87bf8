"""Lowering of each kind of block to a backend's code, once. Weights are named in the code, so that they can be
replaced.
"""

import dataclasses
import hashlib
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.backend.utils import is_same_node
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule, get_lowered_submodules
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from export.lowering.backends import BACKENDS, Backend
from export.lowering.code import Code, Part, Value, decoded
from export.lowering.export_cache import ExportCache
from export.lowering.patches import known_operators, no_patterns
from export.lowering.slices import sliced
from export.lowering.trace import formats, kinds, parameter_name, trace_piece, unweighted
from export.weights.formats.chosen_experts import choose_experts
from export.weights.formats.float32 import FLOAT
from export.weights.formats.format import Format
from export.weights.scheme import Scheme, swaps_pairs
from export.weights.source import linear_layers
from model.block_linear import MOST_MATRICES
from model.config import ModelConfig
from runtime.pte.metadata import MethodSpec
from runtime.pte.parts import session_methods

NO_CACHE = ExportCache(None)


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
        for name, kind in kinds(part, first, scheme).items():
            if (first.name, kind) in codes:
                continue
            piece = None
            for spec in specs:
                key = _key(part, spec, backend, name, scheme) | {"kind": kind}
                entry = cache.get(key)
                if entry is None:
                    piece = piece or _RandomPiece.of(part, first, name, scheme)
                    entry = _lowered(trace_piece(part, name, piece.module, spec), BACKENDS[backend], piece)
                    cache.put(key, entry)
                codes[spec.name, kind] = decoded(entry, spec)
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
    def of(config: ModelConfig, spec: MethodSpec, name: str, scheme: Scheme) -> "_RandomPiece":
        model = unweighted(config, spec)
        module, linear = model.get_submodule(name), formats(config, name, model, scheme)
        for path, _ in linear_layers(module):
            if path not in linear:  # of the half of a block that is not in this piece
                module.set_submodule(path, nn.Identity())
        shapes = {role: parameter.shape for role, parameter in module.named_parameters()}
        by_role = dict[str, Format](dict.fromkeys(shapes, FLOAT)) | {f"{path}.weight": linear[path] for path in linear}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = {role: by_role[role].random(shape) for role, shape in shapes.items()}
        for path, form in linear.items():
            made = form.linear(weights[f"{path}.weight"], weights.get(f"{path}.bias"))
            if parameter_name(config, name, path) == "head.output" and swaps_pairs(config, spec.span, scheme):
                made.register_forward_pre_hook(_swap_pairs)
            module.set_submodule(path, made)
        for role in shapes:
            owner, _, kind = role.rpartition(".")
            if owner not in linear:
                setattr(module.get_submodule(owner), kind, nn.Parameter(weights[role]))
        choose_experts(module)
        return _RandomPiece(module.requires_grad_(False).eval(), by_role)


def _swap_pairs(_: nn.Module, arguments: tuple[Tensor]) -> Tensor:
    """Swaps columns 0 and 1, 2 and 3 and so on of a linear layer's input. The layer's weight, with its columns swapped
    in the same way and packed as 4-bit pairs, is byte for byte equal to the embedding's.
    """
    (x,) = arguments
    pairs = x.view(*x.shape[:-1], -1, 2)
    return torch.cat((pairs[..., 1:], pairs[..., :1]), dim=-1).view(x.shape)


def _key(config: ModelConfig, spec: MethodSpec, backend: str, piece: str, scheme: Scheme) -> dict[str, Any]:
    """Returns a piece's cache key, without its kind."""
    forms = formats(config, piece, unweighted(config, spec), scheme)
    return {
        "config": dataclasses.asdict(config),
        "method": dataclasses.asdict(spec),
        "backend": backend,
        "formats": {path: form.to_json() for path, form in forms.items()},
        "swaps_pairs": swaps_pairs(config, spec.span, scheme),
    }


def _lowered(graph: ExportedProgram, backend: Backend, piece: _RandomPiece) -> dict[str, Any]:
    """Lowers a graph and returns the content of its `Code`, for `export.lowering.code.decoded`."""
    with no_patterns():
        program = to_edge_transform_and_lower(graph, partitioner=backend.partitioners()).exported_program()
    rows, values, calls = _rows(graph), dict[Node, Value](), list[dict[str, Any]]()
    needed, products = _needed(program.graph.output_node()), _products(program.graph.nodes)
    for node in program.graph.nodes:
        if node not in needed:  # checks of sizes
            continue
        if node.op == "placeholder":
            values[node] = _placeholder(program, node)
        elif node.target is operator.getitem:
            values[node] = Value("result", (values[node.args[0]].value[0], node.args[1]))
        elif node.op == "call_function" and node not in values:
            together = products.get(node, [node])
            for index, each in enumerate(together):
                values[each] = Value("result", (len(calls), index if len(together) > 1 else None))
            calls.append(_call(program, together, values, piece, rows))
    results: Any = program.graph.output_node().args[0]
    return {"calls": calls, "results": [tuple(values[node]) for node in results]}


def _needed(output: Node) -> set[Node]:
    """Returns the nodes from which the results are computed."""
    found, left = set[Node](), [output]
    while left:
        node = left.pop()
        left += set(node.all_input_nodes) - found
        found.add(node)
    return found


def _operator(node: Node) -> str:
    """Returns the name of the operator that a node calls, such as llama_pte.linear.default."""
    return str(getattr(node.target, "_op", node.target))


def _products(nodes: Iterable[Node]) -> dict[Node, list[Node]]:
    """Returns the products of the same input by matrices in blocks, which become one call, by the first of them."""
    by_input = defaultdict[Any, list[Node]](list)
    for node in nodes:
        if _operator(node) == "llama_pte.linear.default":
            by_input[node.args[0]].append(node)
    n = MOST_MATRICES
    return {found[i]: found[i : i + n] for found in by_input.values() for i in range(0, len(found), n)}


def _call(
    program: ExportedProgram,
    together: Sequence[Node],
    values: Mapping[Node, Value],
    piece: _RandomPiece,
    rows: str | None,
) -> dict[str, Any]:
    """Returns the content of a `Call` that computes the results of one or more nodes."""
    node, *others = together
    is_delegate = node.target is executorch_call_delegate
    given = [*node.args[is_delegate:], *(argument for each in others for argument in each.args[1:])]
    assert not node.kwargs, f"{node.target} has arguments by name: {node.kwargs}"
    arguments = [_argument(each, values) for each in given]
    if not is_delegate:
        name = f"llama_pte.linear{len(together)}.default" if others else _operator(node)
        return {"operator": name, "arguments": arguments}
    delegate = program.graph_module.get_submodule(str(node.args[0]))
    assert isinstance(delegate, LoweredBackendModule)
    return {
        "backend_id": delegate.backend_id,
        "payload": torch.frombuffer(bytearray(delegate.processed_bytes), dtype=torch.uint8),
        "compile_specs": [(spec.key, bytes(spec.value).hex()) for spec in delegate.compile_specs],
        "arguments": arguments,
        "data": [dataclasses.astuple(part) for part in _data(delegate, piece)],
        "takes": [_shape(each.meta["val"], rows) for each in given if isinstance(each, Node)],
        "gives": [_shape(value, rows) for value in node.meta["val"]],
    }


def _argument(given: Any, values: Mapping[Node, Value]) -> tuple[str, Any]:
    """Returns the content of a `Value` for an argument of a node."""
    if isinstance(given, Node):
        return tuple(values[given])
    if isinstance(given, Sequence) and any(isinstance(each, Node) for each in given):
        return "list", [_argument(each, values) for each in given]
    return "constant", given


def _placeholder(program: ExportedProgram, node: Node) -> Value:
    signature, inputs = program.graph_signature, list(program.graph_signature.user_inputs)
    if node.name in inputs:
        return Value("input", inputs.index(node.name))
    if node.name in signature.inputs_to_parameters:
        return Value("parameter", signature.inputs_to_parameters[node.name].removeprefix("module."))
    constant = (signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants)[node.name]
    return Value("constant", program.state_dict.get(constant, program.constants.get(constant)))


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
