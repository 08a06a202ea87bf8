"""Speed-up from speculative decoding, and from running several texts at once instead of one after another.

python -m tests.bench.sessions                                  # with the files of `make bench` in build/bench
python -m tests.bench.sessions --larger build/small --rounds 5  # train_tiny's preset small; the built-in model drafts

Each round runs every configuration in its own process; ratios are within a round. Run nothing else at the same time.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from export.checkpoints.layouts import BUILT_IN
from tests.bench.peers import FOLDER, ROOT, RUNNER, decoded, export

REPETITIVE = "Lily said hello. Tom said hello. Mom said hello. Lily said hello. Tom said hello."
STORY = "Once upon a time, there was a little girl named Lily."
LANES = (4,)
"""Values of --batch-size."""
PROMPTS, TOKENS = 16, 64
"""Number of prompts, and tokens generated for each."""


def guesses(file: Path, draft: Path | None, prompt: Sequence[str]) -> dict[str, float]:
    """Returns tokens per second without speculation, with --lookup in both runtimes, and with a draft model. Prints
    from which token on the output differs, which rounding of 8-bit activations can cause with random weights.
    """
    runtime: list[str | Path] = [sys.executable, "-m", "runtime.generate", file, *prompt, "--max-new-tokens", "200"]
    native: list[str | Path] = [RUNNER, file, *prompt, "--max-new-tokens", "200"]
    ways = {"runtime": runtime, "runtime --lookup": [*runtime, "--lookup"]}
    ways |= {"llama_runner": native, "llama_runner --lookup": [*native, "--lookup"]}
    ways |= {"runtime --draft": [*runtime, "--draft", draft]} if draft else {}
    found = {}
    for name, way in ways.items():
        done = subprocess.run([*way, "--format", "json"], check=True, capture_output=True, text=True, cwd=ROOT)
        found[name] = decoded(done.stdout)
    expected = found["runtime"][1]
    for name, (_, tokens) in found.items():
        if same := next((i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len(set(pair)) > 1), None):
            print(f"{name}: from token {same} on others", file=sys.stderr)
    return {name: speed for name, (speed, _) in found.items()}


def throughput(files: Mapping[int, Path]) -> dict[str, float]:
    """Returns tokens per second over many texts, by the number of texts that run at once."""
    prompts = FOLDER / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [7 * i + 1, *range(15)]}) + "\n" for i in range(PROMPTS)))
    found = {}
    for lanes, file in files.items():
        command = [sys.executable, "-m", "runtime.batch", file, "--prompts-file", prompts]
        done = subprocess.run([*command, "--max-new-tokens", str(TOKENS)], check=True, capture_output=True, cwd=ROOT)
        found[f"{lanes} at once"] = float(done.stderr.decode().split(" tok/s")[0].rsplit(" ", 1)[1])
    return found


def shown(title: str, rounds: Sequence[Mapping[str, float]]) -> str:
    """Formats a table of medians, and of ratios to the first entry."""
    first, *_ = rounds[0]
    lines = [f"| {title} | tok/s | to {first} |", "|---|---|---|"]
    for name in rounds[0]:
        ratios = sorted(found[name] / found[first] for found in rounds)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append(f"| {name} | {statistics.median(found[name] for found in rounds):.1f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("python -m tests.bench.sessions", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--larger", type=Path, metavar="FOLDER", help="a model with the built-in one's tokenizer")
    options = parser.parse_args()
    if not (FOLDER / "checkpoint").exists():
        raise SystemExit("error: build/bench/checkpoint is missing; run make bench first")
    scheme = ("--quantize", "8da4w", "--kv-dtype", "fp16")
    lanes = {1: FOLDER / "ours-2048.pte"}
    for count in LANES:
        lanes[count] = FOLDER / f"ours-{count}-at-once.pte"
        export(FOLDER / "checkpoint", None, lanes[count], 512, *scheme, "--batch-size", str(count))
    print(shown("1B's shape", [throughput(lanes) for _ in range(options.rounds)]))
    print(shown("1B's shape", [guesses(lanes[1], None, ("--prompt-ids", "5,6,7,8")) for _ in range(options.rounds)]))
    if options.larger:
        tiny, larger = FOLDER / "tiny.pte", FOLDER / "larger.pte"
        export(BUILT_IN, BUILT_IN / "tokenizer.model", tiny, 512)
        export(options.larger, options.larger / "tokenizer.model", larger, 512)
        for name, prompt in (("a story", STORY), ("what repeats", REPETITIVE)):
            print(shown(name, [guesses(larger, tiny, ("--prompt", prompt)) for _ in range(options.rounds)]))


if __name__ == "__main__":
    main()
