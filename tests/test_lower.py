from pathlib import Path

import pytest
from executorch.exir import ExecutorchBackendConfig
from torch.export import ExportedProgram

from export.lower import BACKENDS, Lowered, delegates, lower, operators
from export.trace import GraphOptions, Traced, trace
from model.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def traced(toy_bin: Path) -> Traced:
    return trace(open_checkpoint(toy_bin).build(), GraphOptions(48, 7))


@pytest.fixture(scope="module")
def xnnpack(traced: Traced) -> Lowered:
    return lower(traced, "xnnpack")


def calls(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_everything_but_the_embedding_is_in_one_xnnpack_delegate(xnnpack: Lowered) -> None:
    for name in ("decode", "prefill"):
        program = xnnpack.edge.exported_program(name)
        assert [module.backend_id for module in delegates(program)] == ["XnnpackBackend"]
        assert set(operators(program)) == {"aten::embedding.out"}
    assert xnnpack.requirements.backends == ("XnnpackBackend",)
    assert xnnpack.requirements.operators == ("aten::embedding.out",)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_no_cache_is_copied(xnnpack: Lowered, name: str) -> None:
    """Inside the delegate a cache goes straight to its matrix product, keys by way of the transposition that
    XNNPACK's product takes; it is never expanded, concatenated, cloned or reshaped.
    """
    (delegate,) = delegates(xnnpack.edge.exported_program(name))
    graph = delegate.original_module.graph
    assert not [node for node in graph.nodes if "expand" in str(node.target)]
    caches = [node for node in graph.nodes if node.op == "placeholder" and list(node.meta["val"].shape) == [2, 48, 8]]
    assert len(caches) == 4
    for cache in caches:
        (user,) = cache.users
        if "permute_copy" in str(user.target):
            (user,) = user.users
        assert "aten.bmm.default" in str(user.target)


def test_portable_runs_all_operators_by_itself(traced: Traced) -> None:
    lowered = lower(traced, "portable")
    assert lowered.requirements.backends == ()
    assert not any(delegates(lowered.edge.exported_program(name)) for name in traced.programs)
    assert "aten::bmm.out" in lowered.requirements.operators


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_written_down_are_those_the_program_calls(traced: Traced, xnnpack: Lowered, backend: str) -> None:
    lowered = xnnpack if backend == "xnnpack" else lower(traced, backend)
    plans = lowered.edge.to_executorch(ExecutorchBackendConfig()).executorch_program.execution_plan
    called = {f"{op.name}.{op.overload}" for plan in plans for op in plan.operators}
    assert {name for name in called if not name.startswith("executorch_prim::")} <= set(lowered.requirements.operators)
