import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.lowering.trace import GraphOptions
from export.lowering.write import write_program
from export.quality.eager import reference
from model.errors import InputError
from runtime.engine import executorch
from runtime.engine.program import Program, read_metadata
from runtime.engine.session import Session
from runtime.pte.metadata import Requirements
from tests.conftest import TOY, assembled, planned, random_model, toy_model, write_pte


def test_a_step_takes_and_gives_tensors_by_name(toy_program: Program) -> None:
    method = toy_program.metadata.methods[0]
    for length in (method.min_length, 3, method.max_length):
        inputs = {spec.name: spec.zeros(length) for spec in method.inputs}
        outputs = toy_program.step(method, dict(reversed(inputs.items())))
        expected = {spec.name: spec.sizes(length) for spec in method.outputs}
        assert {name: tuple(tensor.shape) for name, tensor in outputs.items()} == expected


def test_programs_of_equal_shape_have_separate_weights(tmp_path: Path) -> None:
    """XNNPACK shares packed weights of equal names within a process."""
    models = [random_model(TOY, seed) for seed in (0, 1)]
    plans = [planned(model, GraphOptions(48, 1)) for model in models]
    programs = [Program(write_pte(plan, tmp_path / f"{i}.pte", "xnnpack")) for i, plan in enumerate(plans)]
    for made, model in zip(programs, models, strict=True):
        torch.testing.assert_close(Session(made).prefill([5]), reference(model, [[5]])[0][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [0, 40, 5000, -1])
def test_a_truncated_file_is_refused(toy_pte: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "cut.pte").write_bytes(toy_pte.read_bytes()[:size])
    with pytest.raises(InputError, match=r"cut\.pte is (truncated|not a \.pte file)"):
        Program(tmp_path / "cut.pte")


def test_missing_backends_and_operators_are_named(toy_pte: Path, tmp_path: Path) -> None:
    metadata = replace(
        read_metadata(toy_pte),
        requirements=Requirements("9.9.9", ("AbacusBackend",), ("aten::embedding.out", "toy::add.out")),
    )
    write_program(assembled(planned(toy_model(), GraphOptions(48, 1))), metadata, tmp_path / "other.pte")
    with pytest.raises(
        InputError, match=r"needs AbacusBackend, toy::add\.out, which .* install ExecuTorch 9\.9\.9, which made"
    ):
        Program(tmp_path / "other.pte")


def test_missing_kernels_of_the_project_are_reported(toy_pte: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch._C, "_get_operator_names", lambda: ["aten::embedding.out"])
    with pytest.raises(
        InputError, match=r"needs llama_pte::attention\.out, .* install a C\+\+ compiler, then llama-pte again"
    ):
        Program(toy_pte)


def test_a_run_prints_only_its_text_and_statistics(toy_pte: Path) -> None:
    """Runs a new process and checks that libraries print nothing."""
    call = [sys.executable, "-m", "runtime.generate", str(toy_pte), "--max-new-tokens", "2", "--threads", "1"]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("load ")
