"""The common flags of the commands that generate text."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runtime.cli import command
from runtime.cli.terminal import progress
from runtime.engine.program import Program
from runtime.text.generation import GenerationOptions
from runtime.text.sampler import SamplingOptions


def add_generation_flags(parser: argparse.ArgumentParser, as_recommended: bool = False) -> None:
    """Adds the flags for choosing tokens and ending a text, which `generation_options` reads.

    Args:
        as_recommended: whether the defaults are the values that the file recommends, if any.
    """
    add = parser.add_argument
    usual = SamplingOptions()

    def usually(flag: str) -> Any:
        return getattr(usual, flag.strip("-").replace("-", "_"))

    def add_usual(flag: str, metavar: str, kind: type, meaning: str) -> None:
        add(flag, type=kind, default=usually(flag), metavar=metavar, help=meaning)

    def add_recommended(flag: str, metavar: str, kind: type, meaning: str, none: str) -> None:
        said = f"the checkpoint's recommendation, or {none}" if as_recommended else none
        default = None if as_recommended else usually(flag)
        add(flag, type=kind, default=default, metavar=metavar, help=f"{meaning} (default: {said})")

    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="maximum number of new tokens (default: what the context has room for)",
    )
    add_recommended("--temperature", "T", float, "sampling temperature; 0 takes the most likely token", "0")
    add_recommended("--top-k", "K", int, "sample from the K most likely tokens", "all")
    add_recommended("--top-p", "P", float, "sample from the most likely tokens up to probability P", "1")
    add_usual(
        "--min-p", "P", float, "sample from tokens at least P times as likely as the most likely one (default: 0)"
    )
    add_recommended("--repetition-penalty", "R", float, "divisor for logits of recent tokens", "1: none")
    add_usual("--presence-penalty", "A", float, "amount subtracted from logits of recent tokens (default: 0)")
    add_usual(
        "--frequency-penalty",
        "A",
        float,
        "amount subtracted from logits of recent tokens once per occurrence (default: 0)",
    )
    add_usual("--penalty-window", "N", int, "number of tokens that count as recent (default: %(default)s)")
    bias = "value added to a token's logit; repeatable"
    add("--logit-bias", type=_bias, action="append", default=[], metavar="ID=VALUE", help=bias)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def add_program_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for opening a file, which `open_program` reads."""
    add_threads_flag(parser)
    parser.add_argument("--no-check", action="store_true", help="skip the checksum, which reads the whole file once")
    parser.add_argument(
        "--memory-budget",
        type=command.byte_count,
        metavar="SIZE",
        help="memory that this process may use, such as 2GB; shards that do not fit are read again for each step "
        "(default: no limit)",
    )


def open_program(flags: argparse.Namespace, file: Path) -> Program:
    """Opens a file with the flags of `add_program_flags`, and shows that on a terminal.

    Raises:
        InputError: see `Program`.
    """
    with progress(f"load {file}"):
        return Program(file, threads=flags.threads, check=not flags.no_check, memory_budget=flags.memory_budget)


def add_threads_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for the number of threads; see `runtime.engine.program.Program`."""
    parser.add_argument(
        "--threads", type=int, metavar="N", help="number of threads (default: one per core; one for a small model)"
    )


def add_prompts_file_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for a file of prompts, which `runtime.text.prompts.read_prompts` reads."""
    parser.add_argument(
        "--prompts-file",
        type=Path,
        required=True,
        metavar="FILE",
        help="file with one prompt, or one JSON object, per line",
    )


def generation_options(
    flags: argparse.Namespace, recommendation: Mapping[str, float] = MappingProxyType({})
) -> GenerationOptions:
    """Returns the options that the flags of `add_generation_flags` set.

    Args:
        recommendation: the file's recommended values, used for flags that are not given.

    Raises:
        InputError: a value is invalid.
    """
    given = {each.name: getattr(flags, each.name) for each in fields(SamplingOptions) if each.name in flags}
    given = {**recommendation, **{name: value for name, value in given.items() if value is not None}}
    sampling = SamplingOptions(**(given | {"logit_bias": dict(flags.logit_bias)}))
    return GenerationOptions(sampling, flags.max_new_tokens, stop_strings=tuple(map(valid, flags.stop)))


def valid(text: str) -> str:
    """Returns a command-line argument with invalid UTF-8 replaced by U+FFFD."""
    return os.fsencode(text).decode("utf-8", "replace")


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is invalid; give an id and a number such as 1724=-2.5") from None
