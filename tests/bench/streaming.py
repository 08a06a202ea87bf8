"""Tokens a second by memory budget: Llama 3.2 1B's shape in shards, run by the C++ runner in a cgroup of that size.

python -m tests.bench.streaming                    # from the checkpoint that `make bench` left in build/bench; as root
python -m tests.bench.streaming --budgets 400MB 1GB --tokens 8

The cgroup's limit holds for pages of the system's cache, too, so that what does not stay is read from storage for every
token. Run nothing else meanwhile.
"""

import argparse
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model.command import byte_count
from runtime.meter import seconds
from tests.bench.peers import FOLDER, RUNNER, export

SHARDS = FOLDER / "ours.shards"
BUDGETS = ("400MB", "500MB", "600MB", "700MB", "900MB")
MEMORY = Path("/sys/fs/cgroup/memory")
"""Of the first version of cgroups; the second has its files one level up."""


@contextmanager
def limited(size: int) -> Iterator[Path]:
    """A cgroup whose processes may hold `size` bytes, pages of files included: the file that takes their numbers."""
    first = MEMORY.is_dir()
    group = (MEMORY if first else MEMORY.parent) / f"llama-pte-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(size))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


@dataclass(frozen=True)
class Run:
    """What a budget gives.

    Attributes:
        speed: tokens a second.
        peak: the most memory that the process held, in bytes.
        read: bytes a second that it read from storage.
    """

    speed: float
    peak: int
    read: float


def streamed(size: int, tokens: int) -> Run:
    """Runs the shards in a cgroup, a second time if files had to be packed at first."""
    flags = ["--prompt-ids", "5,6,7,8", "--max-new-tokens", str(tokens), "--no-check", "--format", "json"]
    command = [str(part) for part in (RUNNER, SHARDS, "--memory-budget", f"{size}B", *flags)]
    subprocess.run(command, check=True, capture_output=True)
    with limited(size) as group:

        def enter() -> None:
            group.write_text("0")

        done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter)
        out, err = done.communicate()
    if done.returncode:
        raise SystemExit(f"error: {err or 'killed by the cgroup'}")
    found = json.loads(out)
    decode = found["timings"]["decode"]
    peak = re.search(r"peak memory (\d+) MB", err)
    assert peak
    return Run((len(found["token_ids"]) - 1) / decode, int(peak[1]) * 1_000_000, 0.0)


def storage() -> float:
    """Bytes a second that one reader gets from storage, past the system's cache."""
    file = max(SHARDS.glob("*.pte"), key=lambda path: path.stat().st_size)
    command = ["dd", f"if={file}", "of=/dev/null", "bs=4M", "iflag=direct", "status=none"]
    return file.stat().st_size / seconds(lambda: subprocess.run(command, check=True))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.bench.streaming", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, metavar="SIZE")
    parser.add_argument("--tokens", type=int, default=8, help="(default: 8)")
    options = parser.parse_args()
    flags = ("--quantize", "8da4w", "--kv-dtype", "fp16", "--shards", "12")
    export(FOLDER / "checkpoint", None, SHARDS, 512, *flags)
    print(f"storage gives {storage() / 1e9:.2f} GB/s\n\n| budget | tok/s | peak memory |\n|---|---|---|")
    for budget in options.budgets:
        found = streamed(byte_count(budget), options.tokens)
        print(f"| {budget} | {found.speed:.2f} | {found.peak / 1e6:.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
