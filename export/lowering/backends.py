"""The backends available to `--backend`: how each lowers a graph, the packages it requires, and its limits."""

import logging
import os
from collections.abc import Callable, Collection, Iterator
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
    """A backend that can run a graph.

    Attributes:
        runtime: the backend's name in ExecuTorch, in a file's requirements and in the output of `inspect`; empty for
            ExecuTorch's own kernels, which every runtime has.
        partitioners: creates the partitioners that select the parts of a graph for the backend, in the order in which
            they are tried. Imports are done in the call, because some take seconds or fail without an optional package.
        by_block: whether it takes a whole block and refers to weights in its code by the SHA-256 of the data in
            `export.weights.formats.format.Format.parts`, so that equal blocks are lowered once.
        alignment: alignment of such weights in the file, in bytes.
        packs: whether it copies weights into a layout of its own when a file is loaded, instead of using them where the
            file is mapped.
        attention: supported forms of attention, see `export.lowering.trace.GraphOptions`. The first one is the default.
        formats: formats of linear layers that it runs, by the names in `export.weights.formats.registry.FORMATS`.
        packages: packages that lowering imports beyond the project's own dependencies, all in the extra of the
            backend's name.
        refusal: reason why lowering for it is not possible, as the rest of a sentence that begins with its name.
    """

    runtime: str = ""
    partitioners: Callable[[], "list[Partitioner]"] = list
    by_block: bool = False
    alignment: int = 1
    packs: bool = False
    attention: tuple[str, ...] = ("aten",)
    formats: frozenset[str] = frozenset({"float32"})
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
        minimum_deployment_target=coremltools.target.iOS18,  # the first that shares weights between methods
        compute_precision=coremltools.precision.FLOAT32,  # squares of activations overflow float16
    )
    return [CoreMLPartitioner(compile_specs=specs)]


BACKENDS = {
    "xnnpack": Backend(
        "XnnpackBackend",
        _xnnpack,
        by_block=True,
        alignment=16,
        packs=True,
        attention=("fused", "aten"),
        formats=frozenset({"float32", "integer", "blocks"}),
    ),
    "portable": Backend(attention=("aten", "fused")),
    "openvino": Backend("OpenvinoBackend", _openvino, packages=("openvino", "nncf")),
    "vulkan": Backend("VulkanBackend", _vulkan),
    "coreml": Backend("CoreMLBackend", _coreml, packages=("coremltools",)),
    "ethos-u": Backend(
        refusal="needs activations quantised to 8 bits with calibrated ranges, which no --quantize scheme has"
    ),
    "qnn": Backend(
        refusal="needs Qualcomm's AI Engine Direct SDK (QNN), which is on Qualcomm's Software Center, not on PyPI"
    ),
    "mediatek": Backend(
        refusal="needs the wheels mtk_converter and mtk_neuron of MediaTek's NeuroPilot Express SDK, which are on "
        "MediaTek's NeuroPilot portal, not on PyPI"
    ),
    "samsung": Backend(
        refusal="needs Samsung's Exynos AI LiteCore SDK, which is on Samsung's site for SoC developers, not on PyPI"
    ),
    "nxp": Backend(refusal="needs NXP's eIQ Neutron SDK, which is on NXP's eIQ site, not on PyPI"),
}
"""The backends available to `--backend`. portable runs every operator with ExecuTorch's own kernels, which are slow but
available everywhere.
"""


def lowering() -> list[str]:
    """Returns the names of the backends that can be lowered for, including those that need an additional package."""
    return [name for name, backend in BACKENDS.items() if not backend.refusal]


def check(name: str, formats: Collection[str] = ()) -> None:
    """Checks that a model can be lowered for a backend on this machine.

    Args:
        formats: names of the formats of the model's matrices.

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
            f"--backend {name} needs {' and '.join(missing)}, which is not installed; run: pip install "
            f"'llama-pte[{name}]'"
        )
    if not backend.formats >= set(formats):
        able = " or ".join(other for other, row in BACKENDS.items() if row.formats >= set(formats))
        raise InputError(
            f"--backend {name} cannot run quantised layers, whose inputs are quantised at run time; give --quantize "
            f"fp32 or --backend {able}"
        )


def partitioners(name: str) -> "list[Partitioner]":
    """Creates a backend's partitioners.

    Raises:
        InputError: as in `check`.
    """
    check(name)
    return BACKENDS[name].partitioners()


@contextmanager
def quietly() -> Iterator[None]:
    """Suppresses the output and log messages of partitioners and their compilers. Errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), stderr_closed():
            yield
    finally:
        logging.disable(before)
