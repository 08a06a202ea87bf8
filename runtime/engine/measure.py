"""How long calls take, and how much memory this process took. Loads nothing of ExecuTorch's."""

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def seconds(call: Callable[[], object]) -> float:
    """That a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], count: int) -> float:
    """That one of `count` calls takes."""
    return statistics.median(seconds(call) for _ in range(count))


def peak_memory() -> int:
    """The most memory in bytes that this process held, mapped files included."""
    status = Path("/proc/self/status")  # which psutil does not tell, and resource with the process that started it
    if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else ""):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> int:
    """Bytes that this process holds, mapped files included."""
    return int(psutil.Process().memory_info().rss)
