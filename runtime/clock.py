"""How long calls take. Apart from `bench`, for benchmarks that must not load ExecuTorch as we do."""

import statistics
import time
from collections.abc import Callable


def seconds(call: Callable[[], object]) -> float:
    """That a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], count: int) -> float:
    """That one of `count` calls takes."""
    return statistics.median(seconds(call) for _ in range(count))
