"""The flags that commands which generate text share, and what they mean."""

import argparse
import os
from dataclasses import fields
from pathlib import Path

from model import command
from runtime.generation import GenerationOptions
from runtime.program import Program
from runtime.sampler import SamplingOptions


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """How to choose tokens and when to end: `generation_options` reads them."""
    add = parser.add_argument
    add("--max-new-tokens", type=int, metavar="N", help="default: as many as the context holds")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens up to probability P")
    add("--min-p", type=float, default=0.0, metavar="P", help="only tokens P times as likely as the likeliest, or more")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="divides logits of recent tokens (1: none)")
    add("--presence-penalty", type=float, default=0.0, metavar="A", help="taken off logits of recent tokens (0: none)")
    add("--frequency-penalty", type=float, default=0.0, metavar="A", help="the same, as often as they occurred")
    add("--penalty-window", type=int, default=64, metavar="N", help="how many tokens are recent (default: %(default)s)")
    bias = "added to a token's logit; may be given repeatedly"
    add("--logit-bias", type=_bias, action="append", default=[], metavar="ID=VALUE", help=bias)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given repeatedly")
    add("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")


def add_program_flags(parser: argparse.ArgumentParser) -> None:
    """How to open the file."""
    add_threads_flag(parser)
    parser.add_argument("--no-check", action="store_true", help="skip the checksum, which reads the file through once")
    parser.add_argument(
        "--memory-budget",
        type=command.byte_count,
        metavar="SIZE",
        help="what this process may hold, such as 2GB; of a model in shards, those that do not fit are read for each "
        "step (default: no limit)",
    )


def open_program(flags: argparse.Namespace, file: Path) -> Program:
    """The file, as `add_program_flags` says.

    Raises:
        InputError: see `Program`.
    """
    return Program(file, threads=flags.threads, check=not flags.no_check, memory_budget=flags.memory_budget)


def add_threads_flag(parser: argparse.ArgumentParser) -> None:
    """See `runtime.program.Program`."""
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per core, and one for a small model")


def generation_options(flags: argparse.Namespace) -> GenerationOptions:
    """What `add_generation_flags` says.

    Raises:
        InputError: a value is impossible.
    """
    given = {each.name: getattr(flags, each.name) for each in fields(SamplingOptions)}
    sampling = SamplingOptions(**(given | {"logit_bias": dict(flags.logit_bias)}))
    return GenerationOptions(sampling, flags.max_new_tokens, stop_strings=tuple(map(valid, flags.stop)))


def valid(text: str) -> str:
    """As the shell gave it, but valid UTF-8."""
    return os.fsencode(text).decode("utf-8", "replace")


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no bias; give an id and a number such as 1724=-2.5") from None
