"""export_module: converts any nn.Module to a .pte, lowered and checked by the same stages as a Llama model.

    from export.module import export_module
    export_module(MyModel().eval(), (torch.zeros(1, 16),), Path("mine.pte"))

The file is a plain ExecuTorch program with one method, `forward`, which every ExecuTorch runtime can run.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.extension.pybindings import _C
from torch import Tensor, nn

from export.lowering.backends import BACKENDS, check, partitioners, quietly
from export.quality.verification import VerificationError
from model.errors import InputError, listed
from runtime.atomic_file import replacing
from runtime.engine.executorch import lacking

LIMIT = 1e-4
"""Maximum difference from the eager module's results, relative to the largest result if that is above 1."""


def export_module(
    module: nn.Module, inputs: Sequence[Tensor], path: Path, backend: str = "xnnpack", limit: float = LIMIT
) -> Path:
    """Traces the module on example inputs, lowers it, and compares the results of the file with those of the module.

    Args:
        module: takes tensors and returns one or more tensors; in eval mode, float32.
        inputs: an example of every argument; their shapes are fixed in the file.
        path: the .pte to write. Afterwards it is either complete and verified, or unchanged.
        backend: one of `export.lowering.backends.BACKENDS` that can be run on this machine.
        limit: see LIMIT.

    Raises:
        InputError: the backend is unknown or not available on this machine, or the path cannot be written.
        VerificationError: the file's results differ by more than the limit.
    """
    check(backend)
    if absent := lacking([BACKENDS[backend].runtime]):
        raise InputError(
            f"{listed(absent)} is not on this machine, so the file cannot be verified; choose another backend"
        )
    with torch.no_grad():
        expected = module(*inputs)
        program = torch.export.export(module, tuple(inputs))
    with quietly():
        lowered = to_edge_transform_and_lower(program, partitioner=partitioners(backend))
    with replacing(path) as temporary:
        with temporary.open("wb") as stream:
            lowered.to_executorch(ExecutorchBackendConfig()).write_to_file(stream)
        _compare(temporary, inputs, [expected] if isinstance(expected, Tensor) else list(expected), limit)
    return path


def _compare(path: Path, inputs: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> None:
    found = _C._load_program(str(path)).load_method("forward").call(list(inputs))
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        worst = float((ours - theirs).abs().max())
        if not worst <= limit * max(1.0, float(theirs.abs().max())):  # a NaN fails
            raise VerificationError(f"output {number} differs by {worst:.1e} from the module's; nothing was written")
