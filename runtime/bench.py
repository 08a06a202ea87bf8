"""The command `runtime.bench`, which measures how fast a .pte runs on this machine.

It measures prefill by prompt length, decode by position and as a share of the roofline, load time, and memory.

python -m runtime.bench tiny.pte
python -m runtime.bench llama.pte --prefill 512 --decode 16 1000 4000 --format json
python -m runtime.bench llama.pte --plot speed.svg
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("runtime.bench")

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from model.errors import InputError
from runtime.cli.flags import add_threads_flag
from runtime.engine.executorch import read_bandwidth
from runtime.engine.measure import median_seconds, peak_memory, seconds
from runtime.engine.program import Program
from runtime.engine.session import Session

PREFILL = (128, 512, 2048)
"""Default lengths of the prompts for prefill."""

DECODE = (16, 1000, 4000)
"""Default positions for decode."""

STEPS = 32
"""Number of tokens decoded at each position, fewer at the end of the context; the median of their times is reported."""


@dataclass(frozen=True)
class Prefill:
    """The speed of running a prompt of `length` tokens."""

    length: int
    tokens_per_second: float


@dataclass(frozen=True)
class Decode:
    """The speed of decoding one token at a time after `position` tokens.

    Attributes:
        roofline: share of the speed that memory bandwidth allows, if a step reads all weights and the filled caches.
    """

    position: int
    tokens_per_second: float
    roofline: float


@dataclass(frozen=True)
class Measured:
    """The measurements of a file.

    Attributes:
        load: seconds until the file was loaded.
        first_token: seconds from then to the logits after a prompt of 16 tokens.
        bandwidth: bytes a second that all threads together read from memory, measured last.
        peak_bytes: peak memory of the process, the mapped file included.
        prefill, decode: results for the lengths and positions that fit in the context.
    """

    load: float
    first_token: float
    bandwidth: float
    peak_bytes: int
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]

    def __str__(self) -> str:
        lines = [
            f"load {self.load:.2f} s, then first token {self.first_token:.3f} s; memory read at "
            f"{self.bandwidth / 1e9:.1f} GB/s; peak memory {self.peak_bytes / 1e6:.0f} MB",
            *(f"prefill {row.length:>6} tokens  {row.tokens_per_second:10.1f} tok/s" for row in self.prefill),
            *(
                f"decode at {row.position:>6}       {row.tokens_per_second:10.1f} tok/s  "
                f"{row.roofline:6.1%} of roofline"
                for row in self.decode
            ),
        ]
        return "\n".join(lines)


def measure(
    file: Path, prefill: Sequence[int] = PREFILL, decode: Sequence[int] = DECODE, threads: int | None = None
) -> Measured:
    """Measures a file. Each prompt is run twice, and the faster run counts.

    Raises:
        InputError: the file cannot be run, or its context has room for none of the lengths and positions.
    """
    start = time.perf_counter()
    program = Program(file, threads=threads)
    session, load, metadata = Session(program), time.perf_counter() - start, program.metadata
    lengths = [length for length in prefill if length <= session.capacity]
    positions = [position for position in decode if position < session.capacity]
    if not lengths and not positions:
        raise InputError(
            f"--prefill and --decode are too large for the {session.capacity} positions of {file}; give smaller numbers"
        )

    def prefilled(length: int) -> float:
        """Returns the seconds that a prompt takes from the start of a text."""
        prompt = [7919 * index % metadata.config.vocab_size for index in range(length)]
        session.reset()
        return seconds(lambda: session.prefill(prompt))

    first_token = prefilled(min(16, session.capacity))
    prompts = [Prefill(length, length / min(prefilled(length), prefilled(length))) for length in lengths]
    steps = list[tuple[int, float]]()
    for position in positions:
        prefilled(position)
        steps.append((position, median_seconds(lambda: session.decode(1), min(STEPS, session.capacity - position))))
    peak = peak_memory()
    bandwidth = read_bandwidth(threads or len(os.sched_getaffinity(0)))  # last, because it raises the peak memory

    def decoded(position: int, step: float) -> Decode:
        read = metadata.matrix_bytes + session.cache.filled_bytes(position)
        return Decode(position, 1 / step, read / step / bandwidth)

    return Measured(load, first_token, bandwidth, peak, tuple(prompts), tuple(decoded(*step) for step in steps))


def plot(measured: Measured, path: Path) -> None:
    """Plots decoding speed over position.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib, which is not installed; run: pip install 'llama-pte[plot]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row.position for row in measured.decode], [row.tokens_per_second for row in measured.decode], "o-")
    axes.set(xlabel="position", ylabel="tokens a second", ylim=(0, None))
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns exit code 0; for bad input the command ends with 2."""
    options = _parser().parse_args(arguments)
    measured = measure(options.file, options.prefill, options.decode, options.threads)
    print(json.dumps(asdict(measured), indent=2) if options.format == "json" else measured)
    if options.plot:
        plot(measured, options.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.bench", "Measures the speed of a .pte file on this machine.", __doc__)
    add = parser.add_argument
    add("file", type=Path, help=".pte file, or folder of shards or slices")
    add(
        "--prefill",
        type=_positive,
        nargs="+",
        metavar="N",
        default=PREFILL,
        help=f"prompt lengths for prefill (default: {_shown(PREFILL)})",
    )
    add(
        "--decode",
        type=_positive,
        nargs="+",
        metavar="N",
        default=DECODE,
        help=f"positions for decode (default: {_shown(DECODE)})",
    )
    add_threads_flag(parser)
    add("--format", choices=("text", "json"), default="text", help="output format (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="plot of decoding speed over position to write: .svg, .png or .pdf")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is invalid; give a whole number, 1 or more")
    return int(text)


def _shown(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
