"""Measures the time of calls and the memory of this process. Does not import ExecuTorch."""

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def seconds(call: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], count: int) -> float:
    """Returns the median of the seconds that `count` calls take."""
    return statistics.median(seconds(call) for _ in range(count))


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes, mapped files included."""
    status = Path("/proc/self/status")  # psutil has no peak; resource's may be the parent process's
    if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else ""):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> int:
    """Returns the memory of this process in bytes, mapped files included."""
    return int(psutil.Process().memory_info().rss)
