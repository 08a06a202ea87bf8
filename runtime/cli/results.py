"""Prints the results of many texts."""

import json
import sys
import time
from collections.abc import Iterable
from typing import Any

from runtime.engine.measure import peak_memory
from runtime.text.batching import Result
from runtime.text.generation import steps_to_json


def print_results(results: Iterable[Result], where: str, known: int = 0) -> int:
    """Prints a JSON object for each result to stdout and the throughput to stderr; returns the command's exit code.

    Args:
        where: how the texts were run, such as "8 at once" or "3 ranks", for the line of the throughput.
        known: number of tokens that an earlier run chose; they do not count towards the throughput.
    """
    start, prompts, count, failed = time.perf_counter(), 0, -known, 0
    for result in results:
        print(json.dumps(_to_json(result), ensure_ascii=False), flush=True)
        prompts += 1
        count += len(result.steps)
        failed += result.error is not None
    print(
        f"{prompts} prompts, {where}; {count} tokens, {count / (time.perf_counter() - start):.1f} tok/s; "
        f"{failed} could not be run; peak memory {peak_memory() / 1e6:.0f} MB",
        file=sys.stderr,
    )
    return 1 if failed else 0


def _to_json(result: Result) -> dict[str, Any]:
    if result.error is not None:
        return {"number": result.number, "error": result.error}
    return {"number": result.number, **steps_to_json(result.steps)}
