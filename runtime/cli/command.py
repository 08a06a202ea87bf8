"""The start, the help and the exit codes of all commands."""

import argparse
import gc
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from model.errors import InputError

SCRIPT = "llama-pte"
"""The console script, whose sub-commands `runtime.cli.llama_pte` lists."""


def start(module: str) -> NoReturn:
    """Runs `main` of a module as the command `python -m module`; see `run_command`.

    The module, run as __main__, calls this before its other imports; this function then imports it under its own name.
    Libraries take seconds to load, and Ctrl-C must end the command quietly during that time, too. Garbage collection is
    off meanwhile, because it would take a fifth of that time and free almost nothing.
    """
    usual = signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    gc.disable()
    main = import_module(module).main
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, usual)
    run_command(main)


def parser(module: str, description: str, doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser for the command `python -m module`; its help shows the name under which the command was started.

    Args:
        description: the purpose of the command in one sentence.
        doc: the module's docstring; its lines that begin with `python -m` are the examples.
    """
    usual = f"python -m {module}"
    name = sys.argv[0] if sys.argv[0].startswith(f"{SCRIPT} ") else usual
    examples = [line.strip() for line in (doc or "").splitlines() if line.strip().startswith("python -m")]
    return argparse.ArgumentParser(
        name,
        description=description,
        epilog="\n  ".join(["examples:", *(line.replace(usual, name) for line in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def byte_count(text: str) -> int:
    """Reads a number of bytes, such as 400MB, 1.5GB or 64MiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT])(i?)B?|B?)", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is invalid; give a size such as 400MB or 2GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(unit.lower()) + 1 if unit else 0))


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs a command's main and exits with its code, with 2 for bad input, or with 128 + n for signal n.

    SIGTERM and SIGHUP unwind the stack like Ctrl-C, so that temporary files are removed. A closed output pipe ends the
    command without a message.
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
