"""The systems that `peers` compares, each run in its own process: python -m tests.bench.engines NAME FILE CONTEXT.

Prints an empty line after the first token, and the measurements as JSON at the end.
"""

import ctypes
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from runtime.engine.measure import median_seconds, peak_memory, seconds

PROMPT = 512
POSITIONS = {2048: (16, 1000), 8192: (4000,)}
"""--max-seq-len of every system -> the positions at which decode is measured."""
STEPS = 16
"""Tokens decoded at each position; the median time is reported."""

Result = dict[str, float]
"""Measurements of one system, by row of the table, in tokens per second, seconds or bytes."""


class Engine(Protocol):
    """A system with an opened file."""

    def prefill(self, length: int) -> None:
        """Starts a new text of `length` tokens."""
        ...

    def decode(self) -> None:
        """Decodes one token."""
        ...


class Ours:
    """The project's Python runtime."""

    def __init__(self, file: Path, context: int) -> None:
        from runtime.engine.program import Program
        from runtime.engine.session import Session

        self._session = Session(Program(file))

    def prefill(self, length: int) -> None:
        self._session.reset()
        self._session.prefill([5] * length)

    def decode(self) -> None:
        self._session.decode(5)

    def second_half(self, window: Sequence[int]) -> torch.Tensor:
        """Returns the logits after each token of a window from the one before its second half on, but for the last."""
        self._session.reset()
        return self._session.extend(window[:-1], rows=len(window) // 2)


class ExportLlm:
    """ExecuTorch's export_llm, run through its Python bindings because its operator needs PyTorch's libraries."""

    def __init__(self, file: Path, context: int) -> None:
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        from executorch.extension.pybindings.portable_lib import _load_for_executorch

        self._model = _load_for_executorch(str(file))
        self._position = 0

    def prefill(self, length: int) -> None:
        self._position = 0
        while self._position < length:
            self._step(min(length - self._position, PROMPT))

    def decode(self) -> None:
        self._step(1)

    def _step(self, count: int) -> None:
        self._model.forward((torch.full((1, count), 5), torch.tensor([self._position])))
        self._position += count


@functools.cache
def _quiet() -> Any:
    """Returns a callback that drops messages. It is kept, because llama.cpp holds only a pointer to it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


class LlamaCpp:
    """llama.cpp, run through llama-cpp-python."""

    flash = 0
    cache = 1
    """GGML's number of the caches' type: 0 is float32, 1 is float16."""

    def __init__(self, file: Path, context: int) -> None:
        import llama_cpp

        self._library = llama_cpp
        llama_cpp.llama_log_set(_quiet(), ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, PROMPT, PROMPT
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.flash_attn_type = self.flash
        options.type_k = options.type_v = self.cache
        self._context = llama_cpp.llama_init_from_model(model, options)

    def prefill(self, length: int) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        while length > 0:
            self._step(min(length, PROMPT))
            length -= PROMPT

    def decode(self) -> None:
        self._step(1)

    def tokens(self, text: bytes) -> list[int]:
        """Returns the ids of a text, without BOS and without special tokens."""
        ids = (ctypes.c_int32 * len(text))()
        return ids[: self._library.llama_tokenize(self._vocabulary, text, len(text), ids, len(text), False, False)]

    def second_half(self, window: Sequence[int]) -> torch.Tensor:
        """Returns the logits after each token of a window from the one before its second half on, but for the last."""
        return self.logits(window, len(window) // 2 - 1)[:-1]

    def logits(self, tokens: Sequence[int], first: int) -> torch.Tensor:
        """Returns the logits after each token of a text from the one at `first` on."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, i >= first
            batch.seq_id[i][0] = 0
        assert library.llama_decode(self._context, batch) == 0
        width = library.llama_vocab_n_tokens(self._vocabulary)
        rows = [
            np.ctypeslib.as_array(library.llama_get_logits_ith(self._context, i), (width,)).copy()
            for i in range(first, len(tokens))
        ]
        library.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    def _step(self, count: int) -> None:
        tokens = (ctypes.c_int32 * count)(*[5] * count)  # must outlive the batch, which only points to it
        code = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, count))
        assert code == 0, f"llama_decode failed: {code}"
        self._library.llama_synchronize(self._context)


class LlamaCppFlash(LlamaCpp):
    """llama.cpp with flash attention."""

    flash = 1


def decode_row(position: int, context: int) -> str:
    """Returns the name of a row of the table."""
    return f"decode at {position:,} of {context:,}"


def work(engine: Callable[[Path, int], Engine], file: Path, context: int) -> None:
    """Measures one engine in this process."""
    opened = engine(file, context)
    opened.prefill(16)
    opened.decode()
    print(flush=True)
    found = Result()
    if context == min(POSITIONS):
        found[f"prefill {PROMPT}"] = PROMPT / min(seconds(lambda: opened.prefill(PROMPT)) for _ in range(2))
    for position in POSITIONS[context]:
        opened.prefill(position)
        found[decode_row(position, context)] = 1 / median_seconds(opened.decode, STEPS)
    print(json.dumps(found | {"peak memory": peak_memory()}), flush=True)


ENGINES: dict[str, Callable[[Path, int], Engine]] = {
    "runtime": Ours,
    "export_llm": ExportLlm,
    "llama.cpp": LlamaCpp,
    "llama.cpp, flash": LlamaCppFlash,
}


if __name__ == "__main__":
    work(ENGINES[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]))
