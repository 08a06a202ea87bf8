import io

import pytest
import torch
from executorch.exir import ExecutorchBackendConfig

from export.lowering.assemble import Assembled, Deferred, operators
from export.lowering.lower import delegates
from export.lowering.trace import GraphOptions
from tests.conftest import assembled, planned, toy_model


@pytest.fixture(scope="module")
def programs() -> dict[str, Assembled]:
    plan = planned(toy_model(), GraphOptions(48, 7))
    return {backend: assembled(plan, backend) for backend in ("xnnpack", "portable")}


def test_each_piece_is_one_delegate_and_only_the_embedding_is_outside(programs: dict[str, Assembled]) -> None:
    made = programs["xnnpack"]
    for name in ("decode", "prefill"):
        program = made.edge.exported_program(name)
        assert [module.backend_id for module in delegates(program)] == ["XnnpackBackend"] * 3
        assert set(operators(program)) == {"aten::embedding.out"}
    assert made.requirements.backends == ("XnnpackBackend",)
    assert made.requirements.operators == ("aten::embedding.out",)
    assert made.delegates == 6


def test_the_attention_operator_stands_between_segments() -> None:
    made = assembled(planned(toy_model(), GraphOptions(48, 7, "fused")), "xnnpack")
    program = made.edge.exported_program("forward")
    assert [module.backend_id for module in delegates(program)] == ["XnnpackBackend"] * 3
    called = sorted(operators(program))
    assert called == ["aten::embedding.out", *["llama_pte::attention.out"] * 2]


def test_blocks_share_code_and_methods_share_weights(programs: dict[str, Assembled]) -> None:
    """Blocks must differ in the names of their weights only; a weight has the same name in both methods."""
    by_method = [delegates(programs["xnnpack"].edge.exported_program(name)) for name in ("decode", "prefill")]
    stored = [[set(module.named_data_store_output.pte_data) for module in modules] for modules in by_method]
    assert stored[0] == stored[1]
    assert not stored[0][0] & stored[0][1]
    first, second = (module.processed_bytes for module in by_method[0][:2])
    assert len(first) == len(second)
    assert sum(a != b for a, b in zip(first, second, strict=True)) <= 64 * 7


def test_portable_has_no_delegates(programs: dict[str, Assembled]) -> None:
    made = programs["portable"]
    assert made.requirements.backends == ()
    assert made.delegates == 0
    assert "aten::bmm.out" in made.requirements.operators


@pytest.mark.parametrize("backend", ["xnnpack", "portable"])
def test_the_listed_operators_are_those_the_program_calls(programs: dict[str, Assembled], backend: str) -> None:
    made = programs[backend]
    plans = made.edge.to_executorch(ExecutorchBackendConfig()).executorch_program.execution_plan
    called = {f"{op.name}.{op.overload}" for plan in plans for op in plan.operators}
    assert {name for name in called if not name.startswith("executorch_prim::")} <= set(made.requirements.operators)


def test_deferred_data_is_made_when_it_is_written() -> None:
    calls = list[int]()

    def make() -> bytes:
        calls.append(1)
        return bytes(torch.arange(4, dtype=torch.uint8).tolist())

    data, stream = Deferred("name", 4, make), io.BytesIO()
    assert len(data) == 4
    assert not calls
    data.write_to_file(stream)
    assert stream.getvalue() == b"\0\1\2\3"
    with pytest.raises(AssertionError, match="4 bytes were made where 5 were announced"):
        Deferred("name", 5, make).to_bytes()
