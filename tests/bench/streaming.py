"""Tokens per second by memory budget: Llama 3.2 1B's shape in shards, run by the C++ runner in a cgroup of that size.

python -m tests.bench.streaming                    # with the checkpoint of `make bench` in build/bench; as root
python -m tests.bench.streaming --budgets 400MB 1GB --tokens 8

The cgroup's limit includes the page cache, so weights that do not fit are read from storage for every token. Run
nothing else at the same time.
"""

import argparse
import os
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.cli.command import byte_count
from runtime.engine.measure import seconds
from tests.bench.peers import FOLDER, RUNNER, decoded, export

SHARDS = FOLDER / "ours.shards"
BUDGETS = ("400MB", "500MB", "600MB", "700MB", "900MB")
MEMORY = Path("/sys/fs/cgroup/memory")
"""Folder of cgroups version 1; version 2 has its files one level up."""


@contextmanager
def limited(size: int) -> Iterator[Path]:
    """Creates a cgroup with a memory limit of `size` bytes, page cache included. Yields the file to which process ids
    are written.
    """
    first = MEMORY.is_dir()
    group = (MEMORY if first else MEMORY.parent) / f"llama-pte-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(size))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def streamed(size: int, tokens: int) -> tuple[float, int, float]:
    """Returns tokens per second in a cgroup, peak memory of the process in bytes, and bytes per second read from
    storage. A first run without a cgroup packs the weights.
    """
    flags = ["--prompt-ids", "5,6,7,8", "--max-new-tokens", str(tokens), "--no-check", "--format", "json"]
    command = [str(part) for part in (RUNNER, SHARDS, "--memory-budget", f"{size}B", *flags)]
    subprocess.run(command, check=True, capture_output=True)
    _forget()
    with limited(size) as group:
        before, start = _bytes_read(), time.perf_counter()
        inside = ["sh", "-c", f'echo $$ > {group} && exec "$@"', "sh", *command]
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        speed = (_bytes_read() - before) / (time.perf_counter() - start)
    if done.returncode:
        raise SystemExit(f"error: {done.stderr or 'killed by the cgroup'}")
    peak = re.search(r"peak memory (\d+) MB", done.stderr)
    assert peak
    return decoded(done.stdout)[0], int(peak[1]) * 1_000_000, speed


def _forget() -> None:
    """Drops the shards from the page cache, where they would count for another cgroup."""
    os.sync()
    for path in SHARDS.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_read() -> int:
    """Returns the bytes read from storage by child processes that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock * 512


def storage() -> float:
    """Measures the storage's sequential read speed in bytes per second, without the page cache."""
    file = max(SHARDS.glob("*.pte"), key=lambda path: path.stat().st_size)
    command = ["dd", f"if={file}", "of=/dev/null", "bs=4M", "iflag=direct", "status=none"]
    return file.stat().st_size / seconds(lambda: subprocess.run(command, check=True))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("python -m tests.bench.streaming", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, metavar="SIZE")
    parser.add_argument("--tokens", type=int, default=8, help="(default: 8)")
    options = parser.parse_args()
    flags = ("--quantize", "8da4w", "--kv-dtype", "fp16", "--shards", "12")
    export(FOLDER / "checkpoint", None, SHARDS, 512, *flags)
    most = storage()
    print(f"storage gives {most / 1e9:.2f} GB/s\n\n| budget | tok/s | peak memory | of storage |")
    print("|---|---|---|---|")
    for budget in options.budgets:
        speed, peak, read = streamed(byte_count(budget), options.tokens)
        print(f"| {budget} | {speed:.2f} | {peak / 1e6:.0f} MB | {read / most:.0%} |", flush=True)


if __name__ == "__main__":
    main()
