"""backends: what `--backend` takes: how each takes a graph, what it needs for that, and what it cannot take."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from model.errors import InputError
from runtime.engine.executorch import stderr_closed

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner


@dataclass(frozen=True)
class Backend:
    """One way to run a graph.

    Attributes:
        runtime: the name in ExecuTorch, in a file's requirements and in what `inspect` prints; empty for ExecuTorch's
            own kernels, which every runtime has.
        partitioners: makes those that choose what the backend takes, in the order they are to be tried. It imports what
            it needs when it is called: some take seconds, or a package that is not installed.
        by_block: whether it takes a block whole and names the weights in its code, so that a block is lowered once.
        attention: which forms of it, see `export.lowering.trace.GraphOptions`, its graphs may have; the first is
            chosen unasked.
        quantised: whether it runs linear layers of low-bit weights, whose inputs are rounded as they come.
        packages: what lowering imports beyond our own dependencies, all in the extra that has the backend's name.
        refusal: why it cannot be lowered for, as the rest of a sentence that begins with its name.
    """

    runtime: str = ""
    partitioners: Callable[[], "list[Partitioner]"] = list
    by_block: bool = False
    attention: tuple[str, ...] = ("aten",)
    quantised: bool = False
    packages: tuple[str, ...] = ()
    refusal: str = ""


def _xnnpack() -> "list[Partitioner]":
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


def _openvino() -> "list[Partitioner]":
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    return [OpenvinoPartitioner([CompileSpec("device", b"CPU")])]


def _vulkan() -> "list[Partitioner]":
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner()]


def _coreml() -> "list[Partitioner]":
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18,  # the first in which several methods share their weights
        compute_precision=coremltools.precision.FLOAT32,  # squares of activations overflow float16
    )
    return [CoreMLPartitioner(compile_specs=specs)]


BACKENDS = {
    "xnnpack": Backend("XnnpackBackend", _xnnpack, by_block=True, attention=("fused", "aten"), quantised=True),
    "portable": Backend(attention=("aten", "fused")),
    "openvino": Backend("OpenvinoBackend", _openvino, packages=("openvino", "nncf")),
    "vulkan": Backend("VulkanBackend", _vulkan),
    "coreml": Backend("CoreMLBackend", _coreml, packages=("coremltools",)),
    "ethos-u": Backend(
        refusal="takes only graphs whose activations are 8-bit integers of calibrated ranges, which no --quantize makes"
    ),
    "qnn": Backend(
        refusal="needs Qualcomm's AI Engine Direct SDK (QNN), which is not on PyPI but on Qualcomm's Software Center"
    ),
    "mediatek": Backend(
        refusal="needs the wheels mtk_converter and mtk_neuron of MediaTek's NeuroPilot Express SDK, which are not on "
        "PyPI but on MediaTek's NeuroPilot portal"
    ),
    "samsung": Backend(
        refusal="needs Samsung's Exynos AI LiteCore SDK, which is not on PyPI but on Samsung's site for SoC developers"
    ),
    "nxp": Backend(refusal="needs NXP's eIQ Neutron SDK, which is not on PyPI but on NXP's eIQ site"),
}
"""What `--backend` takes. Portable runs every operator by ExecuTorch's own kernels: slow, and everywhere."""


def lowering() -> list[str]:
    """Names of those that can be lowered for, be it with a package more."""
    return [name for name, backend in BACKENDS.items() if not backend.refusal]


def check(name: str, quantised: bool = False) -> None:
    """Whether a model can be lowered for a backend on this machine.

    Args:
        quantised: whether the model has linear layers of low-bit weights.

    Raises:
        InputError: it cannot.
    """
    if name not in BACKENDS:
        raise InputError(f"--backend {name} is unknown; choose from {', '.join(lowering())}")
    backend = BACKENDS[name]
    if backend.refusal:
        raise InputError(f"--backend {name} {backend.refusal}; choose from {', '.join(lowering())}")
    if missing := [package for package in backend.packages if find_spec(package) is None]:
        raise InputError(
            f"--backend {name} needs {' and '.join(missing)}, which this Python lacks; "
            f"run: pip install 'llama-pte[{name}]'"
        )
    if quantised and not backend.quantised:
        able = " or ".join(other for other, row in BACKENDS.items() if row.quantised)
        raise InputError(
            f"--backend {name} cannot run --quantize's layers, whose inputs are rounded as they come; give fp32, or "
            f"--backend {able}"
        )


def partitioners(name: str) -> "list[Partitioner]":
    """A backend's, new.

    Raises:
        InputError: see `check`.
    """
    check(name)
    return BACKENDS[name].partitioners()


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps what partitioners and their compilers print and log away from the user; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), stderr_closed():
            yield
    finally:
        logging.disable(before)
