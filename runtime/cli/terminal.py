"""What commands write to a terminal for the person at it: progress, and lines in colour."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from runtime.text.generation import Step


@contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on stderr, until the block ends, that work goes on and for how long. Shows nothing if that is no terminal.

    Yields:
        a function that takes how much of the work is done, and how much there is; with it, the share that is done and
        the time left are shown as well.
    """
    if not os.isatty(2):
        yield lambda done, total: None
        return
    from rich import progress as bars  # takes a tenth of a second
    from rich.console import Console

    columns = bars.SpinnerColumn(), bars.TextColumn("{task.description}", markup=False), bars.TimeElapsedColumn()
    share = bars.BarColumn(), bars.TaskProgressColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn()
    with bars.Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=3600) as shown:
        task = shown.add_task(name, total=None)

        def advance(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total)
            shown.columns = (*columns, *share)

        yield advance


def until_first(name: str, done: Iterable[tuple[int, int]], steps: Iterator[Step]) -> Iterator[Step]:
    """Yields the steps of a text, and shows progress until the first of them.

    Args:
        name: what is done until then.
        done: does it; gives how much is done, and how much there is.
    """
    with progress(name) as advance:
        for part in done:
            advance(*part)
        first = next(steps, None)
    if first:
        yield first
    yield from steps


def say(line: str, style: str = "") -> None:
    """Prints a line to stderr, in a style of rich's such as "red" if that is a terminal and NO_COLOR is not set."""
    if not os.isatty(2):
        print(line, file=sys.stderr)
        return
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(line, style=style, markup=False)
