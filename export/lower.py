"""lower: graphs become programs for a backend, and what a runtime needs for them is read off."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.backend.partitioner import Partitioner
from executorch.exir.lowered_backend_module import LoweredBackendModule, get_lowered_submodules
from executorch.exir.operator.convert import to_out_variant
from torch.export import ExportedProgram

from export.metadata import Requirements
from export.trace import Traced

BACKENDS: dict[str, Callable[[], list[Partitioner]]] = {
    "xnnpack": lambda: [XnnpackPartitioner()],
    "portable": list,
}
"""What `--backend` takes -> a function that makes its partitioners, in the order they are to be tried. Portable runs
every operator by ExecuTorch's own kernels: slow, and everywhere."""


@dataclass(frozen=True)
class Lowered:
    """Programs ready to be emitted, what a runtime needs to run them, and how many parts of them a backend runs."""

    edge: EdgeProgramManager
    requirements: Requirements
    delegates: int


def lower(traced: Traced, backend: str) -> Lowered:
    """Hands the graphs to the backend's partitioners; what none of them takes stays with ExecuTorch's kernels."""
    partitioners = BACKENDS[backend]
    edge = to_edge_transform_and_lower(traced.programs, partitioner={name: partitioners() for name in traced.programs})
    programs = [edge.exported_program(name) for name in traced.programs]
    return Lowered(
        edge,
        Requirements(
            executorch=version("executorch"),
            backends=tuple(sorted({module.backend_id for program in programs for module in delegates(program)})),
            operators=tuple(sorted({name for program in programs for name in operators(program)})),
        ),
        delegates=sum(len(delegates(program)) for program in programs),
    )


def delegates(program: ExportedProgram) -> list[LoweredBackendModule]:
    """The parts of a lowered graph that a backend runs."""
    return [module for _, module, _ in get_lowered_submodules(program.graph_module)]


def operators(program: ExportedProgram) -> Iterator[str]:
    """Names of the kernels that a lowered graph calls outside its delegates, such as `aten::embedding.out`."""
    for node in program.graph.nodes:
        operator = getattr(node.target, "_op", None)
        if node.op == "call_function" and operator is not None:
            out, _ = to_out_variant(operator)
            yield f"{out._schema.name}.{out._schema.overload_name}"
