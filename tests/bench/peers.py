"""Speed and memory against ExecuTorch's own export and llama.cpp, on Llama 3.2 1B's shape with 4-bit weights.

python -m tests.bench.peers                    # makes what is missing in build/bench: the best part of an hour
python -m tests.bench.peers --rounds 5

All systems take turns, each in a process of its own, so that a machine whose speed drifts slows all alike; what counts
are the ratios within a round. Random weights in groups of 32, all cores. `make bench` installs what it needs; run
nothing else meanwhile.
"""

import argparse
import ctypes
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from runtime.clock import median_seconds, seconds
from tests.bench.export import HIDDEN, SHAPES, SHARED, theirs, write_checkpoint

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "bench"
RUNNER = ROOT / "build" / "host" / "llama_runner"
PROMPT = 512
POSITIONS = {2048: (16, 1000), 8192: (4000,)}
"""--max-seq-len, of all systems alike -> the positions to decode at."""
STEPS = 32
"""Tokens decoded at each: their median time counts."""

Result = dict[str, float]
"""What was measured in one process, by row: tokens a second, seconds, bytes."""


class Engine(Protocol):
    """A system with a file opened: a text is prefilled from its start, and decoded on from there."""

    def prefill(self, length: int) -> None:
        """Starts a text of so many tokens."""
        ...

    def decode(self) -> None:
        """One token more."""
        ...


class Ours:
    """The Python runtime of this project."""

    def __init__(self, file: Path, context: int) -> None:
        from runtime.program import Program
        from runtime.session import Session

        self._session = Session(Program(file))

    def prefill(self, length: int) -> None:
        self._session.reset()
        self._session.prefill([5] * length)

    def decode(self) -> None:
        self._session.decode(5)


class ExportLlm:
    """ExecuTorch's export_llm, run by its Python bindings: its operator needs PyTorch's libraries."""

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


class LlamaCpp:
    """llama.cpp by llama-cpp-python."""

    flash = 0

    def __init__(self, file: Path, context: int) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: llama.cpp holds only the pointer
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, PROMPT, PROMPT
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.flash_attn_type = self.flash
        self._context = llama_cpp.llama_init_from_model(model, options)

    def prefill(self, length: int) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        while length > 0:
            self._step(min(length, PROMPT))
            length -= PROMPT

    def decode(self) -> None:
        self._step(1)

    def _step(self, count: int) -> None:
        tokens = (ctypes.c_int32 * count)(*[5] * count)  # outlives the batch, which only points at it
        code = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, count))
        assert code == 0, f"llama_decode failed: {code}"
        self._library.llama_synchronize(self._context)


class LlamaCppFlash(LlamaCpp):
    """The same with flash attention."""

    flash = 1


def work(engine: Callable[[Path, int], Engine], file: Path, context: int) -> None:
    """Measures one engine in this process: prints a line when the first token is there, and then the result."""
    opened = engine(file, context)
    opened.prefill(16)
    opened.decode()
    print(flush=True)
    found = Result()
    if context == min(POSITIONS):
        found[f"prefill {PROMPT}"] = PROMPT / min(seconds(lambda: opened.prefill(PROMPT)) for _ in range(2))
    for position in POSITIONS[context]:
        opened.prefill(position)
        found[f"decode at {position}"] = 1 / median_seconds(opened.decode, STEPS)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    print(json.dumps(found | {"peak memory": int(peak[1]) * 1024}), flush=True)


def measured(name: str, file: Path, context: int) -> Result:
    """What a system finds in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.peers", "--worker", name, str(file), str(context)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    first_token = time.perf_counter() - start
    result = process.stdout.read()
    if process.wait():
        raise SystemExit(f"error: {name} ended with {process.returncode} on {file}")
    return Result(json.loads(result)) | {"time to first token": first_token}


def measured_cpp(file: Path, context: int) -> Result:
    """What our C++ runner finds."""
    first = [RUNNER, file, "--prompt-ids", ",".join(["5"] * 16), "--max-new-tokens", "1"]
    first_token = seconds(lambda: subprocess.run(first, check=True, capture_output=True))
    flags = ["--prefill", str(PROMPT), "--decode", *map(str, POSITIONS[context]), "--format", "json"]
    found = json.loads(subprocess.run([RUNNER, file, "--bench", *flags], check=True, capture_output=True).stdout)
    result = {f"decode at {row['position']}": row["tokens_per_second"] for row in found["decode"]}
    if context == min(POSITIONS):
        result |= {f"prefill {row['length']}": row["tokens_per_second"] for row in found["prefill"]}
        result |= {f"roofline at {row['position']}": row["roofline"] for row in found["decode"]}
    return result | {"peak memory": found["peak_bytes"], "time to first token": first_token}


@dataclass(frozen=True)
class System:
    """One of those compared: its name, its engine here or our C++ runner, and its file by context."""

    name: str
    engine: Callable[[Path, int], Engine] | None
    file: str

    def run(self, context: int) -> Result:
        file = FOLDER / self.file.format(context=context)
        return measured(self.name, file, context) if self.engine else measured_cpp(file, context)


SYSTEMS = {
    system.name: system
    for system in (
        System("llama_runner", None, "ours-{context}.pte"),
        System("runtime", Ours, "ours-{context}.pte"),
        System("export_llm", ExportLlm, "export_llm-{context}.pte"),
        System("llama.cpp", LlamaCpp, "random.gguf"),
        System("llama.cpp, flash", LlamaCppFlash, "random.gguf"),
    )
}
PEERS = [name for name, system in SYSTEMS.items() if system.engine is not None and system.engine is not Ours]


def prepare() -> None:
    """Makes the files that are missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    checkpoint, shape = FOLDER / "checkpoint", "1b"
    if not checkpoint.exists():
        write_checkpoint(FOLDER / "partial", shape, SHAPES[shape]["n_layers"], tied=False).rename(checkpoint)
    for context in POSITIONS:
        subprocess.run(
            [sys.executable, "-m", "export.llama", "--checkpoint", checkpoint, "--tokenizer", "none", "--quantize",
             "8da4w", "--max-seq-len", str(context), "--output", FOLDER / f"ours-{context}.pte"], check=True, cwd=ROOT,
        )  # fmt: skip
        output = FOLDER / f"export_llm-{context}.pte"
        if not output.exists():
            theirs(checkpoint, FOLDER / "partial.pte", context)
            (FOLDER / "partial.pte").rename(output)
    if not (FOLDER / "random.gguf").exists():
        write_gguf(FOLDER / "partial.gguf", shape)
        (FOLDER / "partial.gguf").rename(FOLDER / "random.gguf")


def write_gguf(path: Path, shape: str) -> None:
    """A random model in Q4_0, its embedding in Q8_0."""
    import gguf

    dim, layers, hidden = SHAPES[shape]["dim"], SHAPES[shape]["n_layers"], HIDDEN[shape]
    kv, rng, writer = dim // SHARED["n_heads"] * SHARED["n_kv_heads"], np.random.default_rng(0), None
    writer = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (writer.add_context_length, max(POSITIONS)), (writer.add_embedding_length, dim),
        (writer.add_block_count, layers),
        (writer.add_feed_forward_length, hidden), (writer.add_head_count, SHARED["n_heads"]),
        (writer.add_head_count_kv, SHARED["n_kv_heads"]), (writer.add_layer_norm_rms_eps, SHARED["norm_eps"]),
        (writer.add_rope_freq_base, SHARED["rope_theta"]), (writer.add_rope_dimension_count, dim // SHARED["n_heads"]),
        (writer.add_vocab_size, SHARED["vocab_size"]), (writer.add_tokenizer_model, "none"),
    ):  # fmt: skip
        add(value)

    def add_matrix(name: str, size: tuple[int, int], kind: gguf.GGMLQuantizationType) -> None:
        values = rng.standard_normal(size, dtype=np.float32) * 0.02
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    four, eight = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
    add_matrix("token_embd", (SHARED["vocab_size"], dim), eight)
    add_matrix("output", (SHARED["vocab_size"], dim), four)
    sizes = {"attn_q": (dim, dim), "attn_k": (kv, dim), "attn_v": (kv, dim), "attn_output": (dim, dim)}
    sizes |= {"ffn_gate": (hidden, dim), "ffn_up": (hidden, dim), "ffn_down": (dim, hidden)}
    for layer, (name, size) in itertools.product(range(layers), sizes.items()):
        add_matrix(f"blk.{layer}.{name}", size, four)
    norms = [f"blk.{layer}.{name}" for layer in range(layers) for name in ("attn_norm", "ffn_norm")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(dim, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def table(rounds: Sequence[dict[str, Result]]) -> str:
    """Medians, and of each of ours the ratio to the best peer of the same round: median, least and most."""
    names = [row for row in rounds[0]["runtime"] if not row.startswith("roofline")]
    lines = ["| | " + " | ".join(SYSTEMS) + " | llama_runner to the best peer | runtime to the best peer |"]
    lines += ["|---" * (len(SYSTEMS) + 3) + "|"]
    for row in names:
        less_is_better = row in ("peak memory", "time to first token")
        best = [(min if less_is_better else max)(found[peer][row] for peer in PEERS) for found in rounds]
        cells = [_shown(row, statistics.median(found[name][row] for found in rounds)) for name in SYSTEMS]
        for mine in ("llama_runner", "runtime"):
            ratios = sorted(found[mine][row] / other for found, other in zip(rounds, best, strict=True))
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    first = f"roofline at {min(itertools.chain(*POSITIONS.values()))}"
    shares = [found["llama_runner"][first] for found in rounds]
    lines += ["", f"{first}: {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) by llama_runner"]
    return "\n".join(lines)


def _shown(row: str, value: float) -> str:
    if row == "peak memory":
        return f"{value / 1e6:.0f} MB"
    return f"{value:.2f} s" if row == "time to first token" else f"{value:.1f} tok/s"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.bench.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="times that every system has its turn (default: 3)")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "FILE", "CONTEXT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, file, context = options.worker
        engine = SYSTEMS[name].engine
        assert engine
        work(engine, Path(file), int(context))
        return
    prepare()
    rounds = list[dict[str, Result]]()
    for number in range(options.rounds):
        found: dict[str, Result] = {name: {} for name in SYSTEMS}
        for context, (name, system) in itertools.product(POSITIONS, SYSTEMS.items()):
            print(f"round {number + 1}: {name}, --max-seq-len {context}", file=sys.stderr, flush=True)
            found[name] = system.run(context) | found[name]  # memory and first token are those of the first context
        rounds.append(found)
    packages = ("torch", "executorch", "torchao", "llama-cpp-python")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {versions}\n")
    print(table(rounds))


if __name__ == "__main__":
    main()
