from pathlib import Path

import pytest
import torch
from executorch.runtime import Runtime
from torch import Tensor, nn

from export.module import export_module
from export.quality.verification import VerificationError
from model.errors import InputError


class TwoResults(nn.Module):
    """A module that is not a Llama, with a convolution, an activation and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(4, 8, 3, padding=1)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.mix(x)) + shift
        return self.out(hidden), hidden.mean(dim=1)


@pytest.mark.parametrize("backend", ["xnnpack", "portable"])
def test_a_module_runs_in_executorchs_own_runtime(tmp_path: Path, backend: str) -> None:
    torch.manual_seed(0)
    module, inputs = TwoResults().eval(), (torch.randn(2, 4, 16), torch.randn(8, 1))
    path = export_module(module, inputs, tmp_path / "mine.pte", backend)
    x = torch.randn(2, 4, 16)
    found = Runtime.get().load_program(path).load_method("forward").execute([x, inputs[1]])
    for ours, theirs in zip(found, module(x, inputs[1]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_file_with_different_results_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"output \d differs by .* from the module's"):
        export_module(TwoResults().eval(), (torch.randn(2, 4, 16), torch.randn(8, 1)), tmp_path / "a.pte", limit=0.0)
    assert not list(tmp_path.iterdir())


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="backend abacus is unknown; choose from xnnpack, portable"):
        export_module(TwoResults().eval(), (torch.randn(2, 4, 16),), tmp_path / "a.pte", "abacus")
