"""The one error that is the user's to mend, and how a command reports it."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class InputError(ValueError):
    """What was given cannot be used. The message is one sentence: the value received and what to do.

    Commands print it and exit with 2; every other exception is a bug of ours and keeps its traceback.
    """


def listed(names: Iterable[str], most: int = 4) -> str:
    """Joins names for a message, cutting a long list: 'a, b, c, d and 12 more'."""
    names = sorted(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs a command's main and exits with its code, with 2 for bad input, or with 128 + n for signal n.

    SIGTERM and SIGHUP unwind the stack like Ctrl-C, so that temporary files are removed. A reader that has seen enough
    and closed the pipe ends the command without a word.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
