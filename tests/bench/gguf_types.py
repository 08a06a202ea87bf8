"""Perplexity, size and speed of this project and of llama.cpp on the same GGUF files, as tables.

python -m tests.bench.gguf_types wiki.test.raw --checkpoint SmolLM2-135M-Instruct.Q4_1.gguf
python -m tests.bench.gguf_types wiki.test.raw --checkpoint model-f16.gguf --types q8_0 q4_k_m --windows 4
python -m tests.bench.gguf_types wiki.test.raw --checkpoint model-f16.gguf --types --schemes 8da8w q4_0:gptq

llama.cpp quantises the checkpoint to each type, and this project exports the result with the blocks as they are. The
text's tokens without BOS are cut into windows of 512; each window starts anew, and its second half is scored. float32
is the model that transformers reads from the checkpoint. Speeds are taken in turns, each in a process of its own. A
scheme, with or without a rounding, is exported from the checkpoint itself, and has no row of llama.cpp's.
"""

import argparse
import itertools
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.bench.engines import LlamaCpp, Ours, decode_row
from tests.bench.peers import FOLDER, ROOT, measured

TYPES = {
    "q8_0": 7, "q6_k": 18, "q5_1": 9, "q5_0": 8, "q5_k_m": 17, "q4_1": 3, "q4_k_m": 15, "q4_k_s": 14, "q4_0": 2,
    "iq4_nl": 25, "mxfp4": 38,
}  # fmt: skip
"""llama.cpp's numbers of its file types (llama_ftype in llama.h)."""
WINDOW = 512
CONTEXT = 2048
ROWS = (f"prefill {WINDOW}", decode_row(16, CONTEXT), decode_row(1000, CONTEXT))


def quantised(checkpoint: Path, kind: str) -> Path:
    """Returns the checkpoint as llama.cpp quantises it to a type."""
    import llama_cpp

    output = FOLDER / f"{checkpoint.stem}-{kind}.gguf"
    if not output.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = TYPES[kind], True
        partial = output.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(str(checkpoint).encode(), str(partial).encode(), options):
            raise SystemExit(f"error: llama.cpp cannot quantise {checkpoint} to {kind}")
        partial.rename(output)
    return output


def exported(checkpoint: Path, output: Path, *flags: str) -> Path:
    """Returns this project's export of a checkpoint, which is made if it does not exist."""
    if not output.exists():
        flags = ("--max-seq-len", str(CONTEXT), "--max-ppl-increase", "10", *flags)
        command = [sys.executable, "-m", "export.llama", "--checkpoint", checkpoint, "--output", output, *flags]
        subprocess.run(command, check=True, cwd=ROOT)
    return output


def perplexity(rows: Iterable[Tensor], windows: Sequence[Sequence[int]]) -> float:
    """Returns the perplexity of the windows' second halves.

    Args:
        rows: for each window, the logits [WINDOW / 2, V] from the position before its second half on.
    """
    targets = (torch.tensor(window[WINDOW // 2 :]).unsqueeze(1) for window in windows)
    losses = [
        -logits.double().log_softmax(-1).gather(1, target).squeeze(1)
        for logits, target in zip(rows, targets, strict=True)
    ]
    return math.exp(torch.cat(losses).mean())


def by_transformers(checkpoint: Path, windows: Sequence[Sequence[int]]) -> float:
    """Returns the perplexity of a GGUF's weights in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.parent, gguf_file=checkpoint.name, dtype=torch.float32)
    with torch.no_grad():
        return perplexity((model(torch.tensor([w])).logits[0, WINDOW // 2 - 1 : -1] for w in windows), windows)


def speeds(gguf: Path, pte: Path, rounds: int) -> dict[str, list[str]]:
    """Returns tokens per second of both systems and our ratio to llama.cpp's, by row: medians over the rounds."""
    systems = {"runtime": pte, "llama.cpp": gguf}
    found = [{name: measured(name, file, CONTEXT) for name, file in systems.items()} for _ in range(rounds)]
    return {
        row: [
            *(f"{statistics.median(each[name][row] for each in found):,.0f}" for name in systems),
            f"{statistics.median(each['runtime'][row] / each['llama.cpp'][row] for each in found):.2f}",
        ]
        for row in ROWS
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser("python -m tests.bench.gguf_types", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("text", type=Path, help="text to measure on")
    parser.add_argument("--checkpoint", type=Path, required=True, help="GGUF file to quantise")
    parser.add_argument("--types", nargs="*", choices=TYPES, default=list(TYPES), help="types (default: all)")
    parser.add_argument("--schemes", nargs="+", default=[], metavar="NAME[:ROUNDING]", help="schemes of --quantize")
    parser.add_argument("--windows", type=int, default=16, help="windows of the text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=0, help="times that speeds are measured (default: not at all)")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    ids = LlamaCpp(options.checkpoint, WINDOW).tokens(options.text.read_bytes()[: 16 * WINDOW * options.windows])
    windows = [ids[start : start + WINDOW] for start in range(0, WINDOW * options.windows, WINDOW)]
    exact = by_transformers(options.checkpoint, windows)
    print(f"float32: {exact:.3f}\n\n| type | GGUF | .pte | llama.cpp | | ours | | ours to llama.cpp's |", end="")
    shown = list(itertools.product(ROWS, ("ours", "llama.cpp", "ratio"))) if options.rounds else []
    print("".join(f" {row}, {name} |" for row, name in shown) + "\n" + "|---" * (8 + len(shown)) + "|", flush=True)
    for kind in options.types:
        gguf = quantised(options.checkpoint, kind)
        pte = exported(gguf, gguf.with_suffix(".pte"), "--quantize", "gguf")
        theirs = perplexity(map(LlamaCpp(gguf, WINDOW).second_half, windows), windows)
        ours = perplexity(map(Ours(pte, CONTEXT).second_half, windows), windows)
        sizes = (f"{file.stat().st_size / 1e6:.1f} MB" for file in (gguf, pte))
        found = [f"{theirs:.3f}", f"{theirs / exact - 1:+.2%}", f"{ours:.3f}", f"{ours / exact - 1:+.2%}"]
        cells = itertools.chain(*speeds(gguf, pte, options.rounds).values()) if options.rounds else ()
        print("|", " | ".join((kind, *sizes, *found, f"{ours / theirs - 1:+.2%}", *cells)), "|", flush=True)
    if options.schemes:
        print("\n| scheme | rounding | .pte | perplexity | over float32 |\n|---|---|---|---|---|", flush=True)
    for scheme in options.schemes:
        name, _, rounding = scheme.partition(":")
        rounding = rounding or "nearest"
        output = FOLDER / f"{options.checkpoint.stem}.{name}.{rounding}.pte"
        pte = exported(options.checkpoint, output, "--quantize", name, "--rounding", rounding)
        ours = perplexity(map(Ours(pte, CONTEXT).second_half, windows), windows)
        row = (name, rounding, f"{pte.stat().st_size / 1e6:.1f} MB", f"{ours:.3f}", f"{ours / exact - 1:+.2%}")
        print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
