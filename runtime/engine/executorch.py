"""Shard: one .pte, run by ExecuTorch; also ExecuTorch's threads, backends and operators in this process.

No other module uses ExecuTorch's bindings.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  first, because ExecuTorch's bindings need its libraries
from executorch.extension.pybindings import _C  # not portable_lib, which imports all of exir: 140 MB and 2 s
from torch import Tensor

from model.errors import InputError, listed
from runtime.engine.kv_cache import copied
from runtime.pte.metadata import Metadata, Requirements, from_constants

# Loading a library registers its kernels. The bindings include no kernels for low-bit weights, unlike ExecuTorch's C++
# libraries; the attention kernel is this project's own (setup.py).
for _name in ("executorch", "executorch_threadpool", "executorch_kernels_quantized"):
    ctypes.CDLL(str(Path(_C.__file__).parents[2] / "lib" / f"lib{_name}.so"))
_NOT_COMPILED = "llama-pte's own kernels were not compiled; install a C++ compiler, then llama-pte again"
_OPERATORS = find_spec("runtime._operators")
_OURS = ctypes.CDLL(str(_OPERATORS.origin)) if _OPERATORS else None
"""The functions of cpp_runner/src/python_api.h. Without them, files exported with `--attention aten` run too, but each
of their methods holds all weights, small models are slower, and files are checked less.
"""

if _OURS:
    _OURS.llama_pte_read_bandwidth.argtypes = [ctypes.c_int]
    _OURS.llama_pte_read_bandwidth.restype = ctypes.c_double
    _OURS.llama_pte_set_threads_off.argtypes = [ctypes.c_bool]
    _OURS.llama_pte_set_threads_off.restype = None
    _OURS.llama_pte_malformed.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    _OURS.llama_pte_malformed.restype = ctypes.c_char_p
    _refused = _OURS.llama_pte_share_packed_weights()
    assert _refused == 0, f"ExecuTorch refuses to share packed weights: {_refused}"

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc's malloc_trim, which returns freed memory to the system; None with another C library."""


class Shard:
    """One file with some or all blocks of a model.

    Attributes:
        path: path of the file.
        metadata: the contents of the file other than graph and weights.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its metadata."""
        self.path = path
        self._program, self.metadata = _open(path)
        self._specs = {spec.name: spec for spec in self.metadata.methods}
        self._methods = dict[str, Any]()

    def load(self) -> None:
        """Loads the methods, which allocates the memory for the weights."""
        with _named(self.path):
            self._methods = {name: self._program.load_method(name) for name in self._specs}

    def read_ahead(self) -> None:
        """Asks the operating system to read the file into the page cache in the background."""
        if hasattr(os, "posix_fadvise"):
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def run_once(self, method: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loads the methods, runs one of them as `run` does, and frees their memory."""
        self.load()
        outputs = {name: copied(tensor) for name, tensor in self.run(method, inputs).items()}
        self._methods.clear()
        if _trim:
            _trim(0)
        return outputs

    def run(self, method: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method, as `Program.step` does; inputs that it does not take are ignored."""
        spec = self._specs[method]
        with _named(self.path):
            outputs = self._methods[method].call([inputs[each.name] for each in spec.inputs], clone_outputs=False)
        return {each.name: tensor for each, tensor in zip(spec.outputs, outputs, strict=True)}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns errors of ExecuTorch into an InputError with the file's path."""
    try:
        yield
    except (RuntimeError, UnicodeEncodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"ExecuTorch cannot run {path} ({reason}); export it again") from error


def _open(path: Path) -> tuple[Any, Metadata]:
    """Opens a file in ExecuTorch and reads its metadata.

    Raises:
        InputError: ExecuTorch cannot open the file, it is malformed, or a metadata field is missing.
    """
    _throw_at_abort()
    with _named(path):
        program = _C._load_program(str(path), program_verification=_C.Verification.InternalConsistency)
    if _OURS:
        whole = np.memmap(path, mode="r")
        if problem := _OURS.llama_pte_malformed(whole.ctypes.data, whole.size):
            raise InputError(f"{path} is malformed ({problem.decode()}); export it again")

    def constant(name: str) -> list[Any]:
        try:
            return program.load_method(name).call([])
        except RuntimeError as error:
            raise InputError(f"{path} has no {name}; export it again") from error

    return program, from_constants(constant)


@cache
def _throw_at_abort() -> None:
    """Makes ExecuTorch raise RuntimeError where it would end the process."""
    if _OURS:
        with stderr_closed():  # ExecuTorch logs that its bindings did the like before
            _OURS.llama_pte_throw_at_abort()


def start_threads(threads: int | None) -> None:
    """Starts ExecuTorch's thread pool, and discards the warnings that it logs on machines that are not ARM.

    Raises:
        InputError: the number of threads is less than 1.
    """
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads} is invalid; give 1 or more")
    with stderr_closed():
        if threads in (None, _C._threadpool_get_thread_count()):
            return
        _C._unsafe_reset_threadpool(threads)


@contextmanager
def threads_off(wanted: bool = True) -> Iterator[None]:
    """Makes ExecuTorch compute in the caller's thread only, if `wanted`."""
    if not wanted or _OURS is None:
        yield
        return
    _OURS.llama_pte_set_threads_off(True)
    try:
        yield
    finally:
        _OURS.llama_pte_set_threads_off(False)


@contextmanager
def stderr_closed() -> Iterator[None]:
    """Discards what native code writes to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def lacking(backends: Iterable[str]) -> set[str]:
    """Returns the backends that ExecuTorch does not have here."""
    with stderr_closed():  # backends log what they search for
        return {name for name in backends if name and not _is_available(name)}


def _is_available(backend: str) -> bool:
    _BEFORE.get(backend, lambda: None)()
    return _C._is_available(backend)


def _find_openvino() -> None:
    """Sets the path at which ExecuTorch loads OpenVINO, if pip has installed it.

    Also limits OpenVINO's instruction set: on processors with bfloat16 it would compute in bfloat16, and ExecuTorch has
    no option against that.
    """
    found = find_spec("openvino")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for library in sorted(Path(folder).glob("libs/libopenvino_c.so*"))[:1]:
            os.environ.setdefault("OPENVINO_LIB_PATH", str(library))
            os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")


_BEFORE = {"OpenvinoBackend": _find_openvino}
"""Backend -> a function to call before ExecuTorch looks the backend up."""


def check_requirements(path: Path, needed: Requirements) -> None:
    """Checks that this process has the backends and operators that a file needs.

    Raises:
        InputError: one is missing.
    """
    backends = lacking(needed.backends)
    operators = {name for name in needed.operators if not name.startswith("executorch_prim::")}
    operators -= set(_C._get_operator_names())
    if ours := {name for name in operators if name.startswith("llama_pte::")}:
        raise InputError(f"{path} needs {listed(ours)}, but {_NOT_COMPILED}, or export the file with --attention aten")
    if missing := backends | operators:
        raise InputError(
            f"{path} needs {listed(missing)}, which the installed ExecuTorch {version('executorch')} lacks; "
            f"install ExecuTorch {needed.executorch}, which made the file, or export it again"
        )


def read_bandwidth(threads: int) -> float:
    """Measures the bytes a second that `threads` threads together read from memory, which bounds decoding speed.

    Raises:
        InputError: the project's own kernels were not compiled.
    """
    if _OURS is None:
        raise InputError(_NOT_COMPILED)
    return float(_OURS.llama_pte_read_bandwidth(threads))
