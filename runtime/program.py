"""Program: an opened .pte, checked before it is believed; immutable, and shared by any number of sessions."""

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch  # noqa: F401  ExecuTorch's bindings need its libraries loaded
from executorch.extension.pybindings import _C  # the bindings alone: portable_lib imports all of exir, 140 MB and 2 s
from torch import Tensor

from export.metadata import Metadata, MethodSpec, Requirements, check_file, from_constants
from model.errors import InputError, listed
from preproc.tokenizer import Tokenizer, from_bytes

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


SMALL = 16_000_000
"""Bytes of matrices below which waking another thread takes longer than it saves; see tests/bench/NOTES.md."""

_without_threads = _THREADPOOL._ZN10executorch9extension10threadpool17NoThreadPoolGuard11set_enabledEb
_without_threads.argtypes = [ctypes.c_bool]


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


class Program:
    """A .pte of ours and its methods.

    Attributes:
        metadata: all that the file carries beside graph and weights.
        tokenizer: the tokenizer inside the file, or None.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, check: bool = True) -> None:
        """Opens the file: checks it, reads its metadata, and loads its methods.

        Args:
            threads: how many threads ExecuTorch uses, in the whole process; None leaves its choice, one per core,
                and runs a model of less than SMALL bytes in the caller's.
            check: compare the checksum, which reads the file through once.

        Raises:
            InputError: not a whole file of ours, or this runtime lacks what it needs.
        """
        path = Path(path)
        check_file(path, checksum=check)
        _start_threads(threads)
        self._program, self.metadata = _open(path)
        _check_requirements(path, self.metadata.requirements)
        self.tokenizer: Tokenizer | None = None
        if self.metadata.tokenizer:
            self.tokenizer = from_bytes(self.metadata.tokenizer, self.metadata.tokenizer_kind)
        self._is_small = threads is None and self.metadata.matrix_bytes < SMALL
        with self._threads():
            self._methods = {spec.name: self._program.load_method(spec.name) for spec in self.metadata.methods}

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once.

        Args:
            inputs: contiguous tensors by the names of `method.inputs`, read in place.

        Returns:
            outputs by the names of `method.outputs`, valid only until the next step of this program.
        """
        given = [inputs[spec.name] for spec in method.inputs]
        with self._threads():
            outputs = self._methods[method.name].call(given, clone_outputs=False)
        return {spec.name: tensor for spec, tensor in zip(method.outputs, outputs, strict=True)}

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """A small model does without ExecuTorch's threads."""
        if self._is_small:
            _without_threads(True)
        try:
            yield
        finally:
            if self._is_small:
                _without_threads(False)


def read_bandwidth(threads: int) -> float:
    """Bytes a second that so many threads together read from memory: what decoding cannot be faster than."""
    if _OURS is None:
        raise InputError(_NOT_COMPILED)
    _OURS.llama_pte_read_bandwidth.restype = ctypes.c_double
    return float(_OURS.llama_pte_read_bandwidth(ctypes.c_int(threads)))


def read_metadata(path: str | Path) -> Metadata:
    """Reads what a file carries without loading its methods.

    Raises:
        InputError: not a whole file of ours.
    """
    check_file(Path(path))
    return _open(Path(path))[1]


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


def _start_threads(threads: int | None) -> None:
    """Starts ExecuTorch's thread pool, which at its start logs what it finds missing on machines that are not ARM."""
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads} is impossible; give 1 or more")
    with stderr_closed():
        if threads in (None, _C._threadpool_get_thread_count()):
            return
        _C._unsafe_reset_threadpool(threads)


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


def _check_requirements(path: Path, needed: Requirements) -> None:
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
