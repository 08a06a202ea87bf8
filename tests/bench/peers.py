"""Compares speed and memory with ExecuTorch's own export and llama.cpp, on Llama 3.2 1B's shape with 4-bit weights.

python -m tests.bench.peers                    # first makes the missing files in build/bench, in up to an hour
python -m tests.bench.peers --rounds 5
python -m tests.bench.peers --llama2c path/to/run.c path/to/stories260K    # .bin, tok512.bin and tok512.model

Each round runs every system in its own process, so that a drift of the machine's speed affects all alike; the ratios
within a round are compared. Weights are random, in groups of 32. All cores are used. Caches are float16, llama.cpp's
default, except export_llm's, which has no such option. `make bench` installs the requirements; run nothing else at the
same time. Replaces the table in docs/benchmarks.md.
"""

import argparse
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

import numpy as np

from runtime.engine.measure import seconds
from tests.bench.engines import ENGINES, POSITIONS, PROMPT, Result, decode_row
from tests.bench.export import HIDDEN, SHAPES, SHARED, theirs, write_checkpoint

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "bench"
RUNNER = ROOT / "build" / "host" / "llama_runner"
REPORT = ROOT / "docs" / "benchmarks.md"
Round = dict[str, Result]
"""Results by system."""


def measured(name: str, file: Path, context: int) -> Result:
    """Measures an engine in its own process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.engines", name, str(file), str(context)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    first_token = time.perf_counter() - start
    result = process.stdout.read()
    if process.wait():
        raise SystemExit(f"error: {name} ended with {process.returncode} on {file}")
    return Result(json.loads(result)) | {FIRST_TOKEN: first_token}


def measured_cpp(file: Path, context: int) -> Result:
    """Measures this project's C++ runner."""
    first = [RUNNER, file, "--prompt-ids", ",".join(["5"] * 16), "--max-new-tokens", "1"]
    first_token = seconds(lambda: subprocess.run(first, check=True, capture_output=True))
    flags = ["--prefill", str(PROMPT), "--decode", *map(str, POSITIONS[context]), "--format", "json"]
    found = json.loads(subprocess.run([RUNNER, file, "--bench", *flags], check=True, capture_output=True).stdout)
    result = {decode_row(row["position"], context): row["tokens_per_second"] for row in found["decode"]}
    if context == min(POSITIONS):
        result |= {f"prefill {row['length']}": row["tokens_per_second"] for row in found["prefill"]}
        result["roofline"] = found["decode"][0]["roofline"]
    return result | {"peak memory": found["peak_bytes"], FIRST_TOKEN: first_token}


def run(name: str, context: int) -> Result:
    """Measures a system on its file."""
    file = FOLDER / SYSTEMS[name].format(context=context)
    return measured(name, file, context) if name in ENGINES else measured_cpp(file, context)


def in_turns(systems: dict[str, list[str | Path]], position: int) -> Result:
    """Measures decode at one position with several commands. Each command runs twice, in order and in reverse, so that
    a drift of the machine's speed affects all alike.
    """
    found: dict[str, list[float]] = {name: [] for name in systems}
    for name in (*systems, *reversed(systems)):
        flags = ["--prefill", "16", "--decode", str(position), "--format", "json"]
        done = subprocess.run([*systems[name], *flags], check=True, capture_output=True, cwd=ROOT)
        found[name].append(json.loads(done.stdout)["decode"][0]["tokens_per_second"])
    return {name: statistics.mean(speeds) for name, speeds in found.items()}


def growth() -> Result:
    """Compares decode speed on files exported for a short and a long context, with the C++ runner."""
    return in_turns({str(n): [RUNNER, FOLDER / f"ours-{n}.pte", "--bench"] for n in GROWTH}, 1000)


def languages() -> Result:
    """Compares decode speed of the Python runtime and the C++ runner."""
    file = FOLDER / f"ours-{min(POSITIONS)}.pte"
    runtime = [sys.executable, "-m", "runtime.bench", file]
    return in_turns({"runtime": runtime, "llama_runner": [RUNNER, file, "--bench"]}, 16)


SYSTEMS = {
    "llama_runner": "ours-{context}.pte",
    "runtime": "ours-{context}.pte",
    "export_llm": "export_llm-{context}.pte",
    "llama.cpp": "random.gguf",
    "llama.cpp, flash": "random.gguf",
}
"""Systems -> their files."""
GROWTH = (1024, 8192)
"""Values of --max-seq-len, which should not affect decode speed at a fixed position."""
PEERS = [name for name in SYSTEMS if name not in ("llama_runner", "runtime")]
FIRST_TOKEN = "time to first token"
LESS_IS_BETTER = ("peak memory", FIRST_TOKEN)


def prepare() -> None:
    """Makes the missing files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    checkpoint, shape = FOLDER / "checkpoint", "1b"
    if not checkpoint.exists():
        write_checkpoint(FOLDER / "partial", shape, SHAPES[shape]["n_layers"], tied=False).rename(checkpoint)
    for context in sorted({*POSITIONS, *GROWTH}):
        export(checkpoint, None, FOLDER / f"ours-{context}.pte", context, "--quantize", "8da4w", "--kv-dtype", "fp16")
    for context in POSITIONS:
        output = FOLDER / f"export_llm-{context}.pte"
        if not output.exists():
            theirs(checkpoint, FOLDER / "partial.pte", context)
            (FOLDER / "partial.pte").rename(output)
    if not (FOLDER / "random.gguf").exists():
        write_gguf(FOLDER / "partial.gguf", shape)
        (FOLDER / "partial.gguf").rename(FOLDER / "random.gguf")


def export(checkpoint: Path, tokenizer: Path | None, output: Path, context: int, *flags: str) -> None:
    """Runs this project's export, which keeps a file that is up to date."""
    command = [sys.executable, "-m", "export.llama", "--checkpoint", checkpoint, "--tokenizer", tokenizer or "none"]
    subprocess.run([*command, "--max-seq-len", str(context), "--output", output, *flags], check=True, cwd=ROOT)


def write_gguf(path: Path, shape: str) -> None:
    """Writes a random model in Q4_0, with its embedding in Q8_0."""
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


def stories(source: Path, folder: Path) -> Callable[[], Result]:
    """Returns a function that measures stories260K, a model so small that the overhead of a step dominates.

    Args:
        source: llama2.c's run.c, compiled with its author's fastest flags.
        folder: contains stories260K.bin, tok512.bin and tok512.model.
    """
    theirs, ours = FOLDER / "llama2c", FOLDER / "stories260K.pte"
    subprocess.run(["gcc", "-Ofast", "-march=native", source, "-lm", "-o", theirs], check=True)
    export(folder / "stories260K.bin", folder / "tok512.model", ours, 512)

    def run() -> Result:
        flags = ["-z", folder / "tok512.bin", "-t", "0", "-n", "256"]
        done = subprocess.run([theirs, folder / "stories260K.bin", *flags], check=True, capture_output=True, text=True)
        found = re.search(r"achieved tok/s: ([\d.]+)", done.stderr)
        flags = ["--prompt-ids", "1", "--max-new-tokens", "255", "--temperature", "0", "--format", "json"]
        done = subprocess.run([RUNNER, ours, *flags], check=True, capture_output=True, text=True)
        assert found
        return {"llama2.c": float(found[1]), "llama_runner": decoded(done.stdout)[0]}

    return run


def decoded(printed: str) -> tuple[float, list[int]]:
    """Returns tokens per second of decode, and the tokens, from the JSON output of either runtime."""
    found = json.loads(printed)
    return (len(found["token_ids"]) - 1) / found["timings"]["decode"], found["token_ids"]


def best(found: Round, row: str) -> float:
    """Returns the best of the other systems' results in a row."""
    values = [found[peer][row] for peer in PEERS]
    return min(values) if row in LESS_IS_BETTER else max(values)


@dataclass(frozen=True)
class Aim:
    """A target for a ratio within a round: at least `bound`, or at most `bound` where less is better."""

    name: str
    bound: float
    ratio: Callable[[Round], float]
    less: bool = False

    def line(self, rounds: Sequence[Round]) -> str:
        """Formats the ratio's median, minimum and maximum over the rounds."""
        ratios = sorted(self.ratio(found) for found in rounds)
        middle = statistics.median(ratios)
        reached = middle <= self.bound if self.less else middle >= self.bound
        spread = f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        bound = f"at {'most' if self.less else 'least'} {self.bound:.2f}"
        return f"| {self.name} | {spread} | {bound} | {'reached' if reached else 'not reached'} |"


def to_best(row: str, bound: float) -> Aim:
    """Returns the target for the C++ runner relative to the best of the other systems."""
    return Aim(
        f"{row}, llama_runner to the best of the others", bound,
        lambda found: found["llama_runner"][row] / best(found, row), row in LESS_IS_BETTER,
    )  # fmt: skip


def between(name: str, row: str, mine: str, other: str, bound: float) -> Aim:
    """Returns the target for one system relative to another."""
    less = row in LESS_IS_BETTER
    return Aim(name, bound, lambda found: found[mine][row] / found[other][row], less)


AIMS = (
    to_best(f"prefill {PROMPT}", 1.5),
    to_best(decode_row(16, 2048), 1.15),
    to_best(decode_row(1000, 2048), 1.25),
    to_best(decode_row(4000, 8192), 1.25),
    to_best("peak memory", 0.9),
    between("time to first token, both from Python, to export_llm", FIRST_TOKEN, "runtime", "export_llm", 0.5),
    Aim("decode at 16 to the roofline", 0.85, lambda found: found["llama_runner"]["roofline"]),
    Aim(
        "decode at 1,000, exported for 8,192 to exported for 1,024", 0.97,
        lambda found: found["growth"]["8192"] / found["growth"]["1024"],
    ),
    Aim(
        "decode at 16, runtime to llama_runner", 0.97,
        lambda found: found["languages"]["runtime"] / found["languages"]["llama_runner"],
    ),
)  # fmt: skip
STORIES = Aim(
    "stories260K, 255 tokens, llama_runner to llama2.c", 0.5,
    lambda found: found["stories260K"]["llama_runner"] / found["stories260K"]["llama2.c"],
)  # fmt: skip


def table(rounds: Sequence[Round]) -> str:
    """Formats a table of medians by system."""
    lines = ["| | " + " | ".join(SYSTEMS) + " |", "|---" * (len(SYSTEMS) + 1) + "|"]
    for row in rounds[0]["export_llm"]:
        cells = [_shown(row, statistics.median(found[name][row] for found in rounds)) for name in SYSTEMS]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(row: str, value: float) -> str:
    if row == "peak memory":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:.1f} s" if row == FIRST_TOKEN else f"{value:.1f} tok/s"


def report(rounds: Sequence[Round]) -> str:
    """Formats the whole report: machine, versions, table and targets."""
    packages = ("torch", "executorch", "torchao", "llama-cpp-python")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = processor[1] if processor else platform.machine()
    aims = [*AIMS, STORIES] if "stories260K" in rounds[0] else AIMS
    return "\n".join([
        f"{date.today()}, {len(os.sched_getaffinity(0))} cores of {machine}, {versions}; {len(rounds)} rounds:",
        "", instruction_sets(), "", table(rounds), "",
        "Ratios within a round: median, least and most.", "",
        "| | ratio | wanted | |", "|---|---|---|---|", *(aim.line(rounds) for aim in aims),
    ])  # fmt: skip


def instruction_sets() -> str:
    """Describes the instruction sets that llama.cpp was compiled for, and those that the other systems may use."""
    import llama_cpp

    wanted = r"\b(?:avx2|fma|avx512f|avx512_vnni|avx512_bf16|amx_\w+|asimddp|i8mm|sve2?|sme)\b"
    found = dict.fromkeys(re.findall(wanted, Path("/proc/cpuinfo").read_text()))
    compiled = llama_cpp.llama_print_system_info().decode().strip(" |\n")
    return f"Instruction sets: llama.cpp was built with {compiled}; the others choose among {', '.join(found)}."


def write_report(text: str) -> None:
    """Replaces the last report in docs/benchmarks.md."""
    begin, end = "<!-- make bench -->\n", "<!-- end of make bench -->"
    before, rest = REPORT.read_text().split(begin)
    REPORT.write_text(f"{before}{begin}{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("python -m tests.bench.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="times that every system has its turn (default: 3)")
    parser.add_argument("--llama2c", nargs=2, type=Path, metavar=("RUN_C", "STORIES260K"), help="compare with it, too")
    options = parser.parse_args()
    prepare()
    small = stories(*options.llama2c) if options.llama2c else None
    rounds = list[Round]()
    for number in range(options.rounds):
        found: Round = {name: {} for name in SYSTEMS}
        for context, name in itertools.product(POSITIONS, SYSTEMS):
            print(f"round {number + 1}: {name}, --max-seq-len {context}", file=sys.stderr, flush=True)
            found[name] = run(name, context) | found[name]  # keep memory and first token of the first context
        found["growth"], found["languages"] = growth(), languages()
        if small:
            found["stories260K"] = small()
        rounds.append(found)
    text = report(rounds)
    print(text)
    write_report(text)


if __name__ == "__main__":
    main()
