"""Shard: one .pte as ExecuTorch runs it, and what this process's ExecuTorch has and lacks; nothing else knows its
bindings.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch  # noqa: F401  before ExecuTorch's bindings, which need its libraries loaded
from executorch.extension.pybindings import _C  # the bindings alone: portable_lib imports all of exir, 140 MB and 2 s
from torch import Tensor

from model.errors import InputError, listed
from runtime.engine.kv_cache import copied
from runtime.pte.metadata import Metadata, Requirements, from_constants

# Kernels register themselves. Unlike the C++ libraries, the bindings come without those of low-bit weights; attention
# is ours (setup.py).
_LIBRARIES = Path(_C.__file__).parents[2] / "lib"
_EXECUTORCH, _THREADPOOL, _ = (
    ctypes.CDLL(str(_LIBRARIES / f"lib{name}.so"))
    for name in ("executorch", "executorch_threadpool", "executorch_kernels_quantized")
)
_NOT_COMPILED = "llama-pte's own kernels were not compiled; install it again, with a C++ compiler at hand"
_OPERATORS = find_spec("runtime._operators")
_OURS = ctypes.CDLL(str(_OPERATORS.origin)) if _OPERATORS else None

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc's, which keeps what is freed for later unless it is told not to."""

_set_without_threads = _THREADPOOL._ZN10executorch9extension10threadpool17NoThreadPoolGuard11set_enabledEb
_set_without_threads.argtypes = [ctypes.c_bool]


class _BackendOption(ctypes.Structure):
    """executorch/runtime/backend/options.h: a key, and a variant whose first kind is bool."""

    _fields_ = (("key", ctypes.c_char * 64), ("value", ctypes.c_char * 256), ("kind", ctypes.c_uint32))


class _Options(ctypes.Structure):
    _fields_ = (("data", ctypes.POINTER(_BackendOption)), ("size", ctypes.c_size_t))


def _share_packed_weights() -> None:
    """XNNPACK packs each weight once for all methods, not once for each: half the memory, and less time to load."""
    set_option = _EXECUTORCH._ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE
    set_option.argtypes = [ctypes.c_char_p, _Options]
    option = _BackendOption(key=b"weight_cache_enabled", value=b"\1", kind=0)
    error = set_option(b"XnnpackBackend", _Options(ctypes.pointer(option), 1))
    assert error == 0, f"ExecuTorch refuses to share packed weights: {error}"


_share_packed_weights()


class Shard:
    """One file: some blocks of a model, or all.

    Attributes:
        path: of the file.
        metadata: all that it carries beside graph and weights.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its metadata."""
        self.path = path
        self._program, self.metadata = _open(path)
        self._specs = {spec.name: spec for spec in self.metadata.methods}
        self._methods = dict[str, Any]()

    def load(self) -> None:
        """Loads its methods, which takes the memory for its weights."""
        self._methods = {name: self._program.load_method(name) for name in self._specs}

    def read_ahead(self) -> None:
        """Has the system read the file while something else is computed."""
        if hasattr(os, "posix_fadvise"):
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def run_once(self, method: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loads the methods, runs one of them as `run` does, and gives their memory back."""
        self.load()
        outputs = {name: copied(tensor) for name, tensor in self.run(method, inputs).items()}
        self._methods.clear()
        if _trim:
            _trim(0)
        return outputs

    def run(self, method: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method on those of the inputs that it takes, as `Program.step` does."""
        spec = self._specs[method]
        outputs = self._methods[method].call([inputs[each.name] for each in spec.inputs], clone_outputs=False)
        return {each.name: tensor for each, tensor in zip(spec.outputs, outputs, strict=True)}


def _open(path: Path) -> tuple[Any, Metadata]:
    """ExecuTorch's program and what it carries.

    Raises:
        InputError: ExecuTorch does not take it, or it lacks something that it should carry.
    """
    try:
        program = _C._load_program(str(path))
    except (RuntimeError, UnicodeEncodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"ExecuTorch cannot open {path} ({reason}); export it again") from error

    def constant(name: str) -> list[Any]:
        try:
            return program.load_method(name).call([])
        except RuntimeError as error:
            raise InputError(f"{path} carries no {name}; export it again") from error

    return program, from_constants(constant)


def start_threads(threads: int | None) -> None:
    """Starts ExecuTorch's thread pool, which at its start logs what it finds missing on machines that are not ARM."""
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads} is impossible; give 1 or more")
    with stderr_closed():
        if threads in (None, _C._threadpool_get_thread_count()):
            return
        _C._unsafe_reset_threadpool(threads)


@contextmanager
def threads_off(wanted: bool = True) -> Iterator[None]:
    """Has the caller's thread compute alone."""
    if wanted:
        _set_without_threads(True)
    try:
        yield
    finally:
        if wanted:
            _set_without_threads(False)


@contextmanager
def stderr_closed() -> Iterator[None]:
    """Keeps what native code logs from the user."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def lacking(backends: Iterable[str]) -> set[str]:
    """Those of ExecuTorch's backends that cannot be run here."""
    with stderr_closed():  # they log what they looked for
        return {name for name in backends if name and not _is_available(name)}


def _is_available(backend: str) -> bool:
    _BEFORE.get(backend, lambda: None)()
    return _C._is_available(backend)


def _find_openvino() -> None:
    """Tells ExecuTorch where pip put OpenVINO, if it did, which is loaded when a file asks for it.

    It would compute in bfloat16 where the processor can, and ExecuTorch has no option to forbid it.
    """
    found = find_spec("openvino")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for library in sorted(Path(folder).glob("libs/libopenvino_c.so*"))[:1]:
            os.environ.setdefault("OPENVINO_LIB_PATH", str(library))
            os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")


_BEFORE = {"OpenvinoBackend": _find_openvino}
"""What ExecuTorch's backends want done before they are asked for."""


def check_requirements(path: Path, needed: Requirements) -> None:
    backends = lacking(needed.backends)
    operators = {name for name in needed.operators if not name.startswith("executorch_prim::")}
    operators -= set(_C._get_operator_names())
    if ours := {name for name in operators if name.startswith("llama_pte::")}:
        raise InputError(f"{path} needs {listed(ours)}, and {_NOT_COMPILED}, or export the file with --attention aten")
    if missing := backends | operators:
        raise InputError(
            f"{path} needs {listed(missing)}, which ExecuTorch {version('executorch')} here lacks; "
            f"it was made with ExecuTorch {needed.executorch}: install that, or export the file again"
        )


def read_bandwidth(threads: int) -> float:
    """Bytes a second that so many threads together read from memory: what decoding cannot be faster than."""
    if _OURS is None:
        raise InputError(_NOT_COMPILED)
    _OURS.llama_pte_read_bandwidth.restype = ctypes.c_double
    return float(_OURS.llama_pte_read_bandwidth(ctypes.c_int(threads)))
