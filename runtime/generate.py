"""The command `runtime.generate`, which continues a prompt.

python -m runtime.generate tiny.pte --prompt "Once upon a time"
python -m runtime.generate tiny.pte --prompt "The dog" --temperature 0.8 --top-p 0.9 --seed 7 --max-new-tokens 100
python -m runtime.generate tiny.pte --prompt-file story.txt
python -m runtime.generate tiny.pte --prompt "Her name is" --temperature 1 --regex " (Lily|Mia)[.]"
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("runtime.generate")

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.errors import InputError
from runtime.cli.flags import add_generation_flags, add_program_flags, generation_options, open_program, valid
from runtime.cli.terminal import until_first
from runtime.engine.measure import peak_memory
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.constraint import Constraint, json_schema, regex
from runtime.text.generation import GenerationOptions, Step, generate, steps_to_json
from runtime.text.prompts import prompt_ids, read_text
from runtime.text.sampler import Rng
from runtime.text.speculative import Draft, Drafter, Lookup


@dataclass
class Statistics:
    """The times, in seconds, and numbers of tokens of a run."""

    load: float
    prompt_tokens: int
    first_token: float = 0.0
    new_tokens: int = 0
    decode: float = 0.0

    def __str__(self) -> str:
        decoded = self.new_tokens - 1
        decode = f"{decoded / self.decode:.1f} tok/s" if decoded > 0 else "none"
        return (
            f"load {self.load:.2f} s; prefill {self.prompt_tokens} tokens, {self.prompt_tokens / self.first_token:.1f} "
            f"tok/s; first token {self.load + self.first_token:.2f} s after start of load; decode {decoded} tokens, "
            f"{decode}; peak memory {peak_memory() / 1e6:.0f} MB"
        )


def _timed(steps: Iterator[Step], statistics: Statistics) -> Iterator[Step]:
    start = first = time.perf_counter()
    for step in steps:
        now = time.perf_counter()
        if not statistics.new_tokens:
            first, statistics.first_token = now, now - start
        statistics.new_tokens += 1
        statistics.decode = now - first
        yield step


def _print_text(steps: Iterator[Step]) -> None:
    """Prints the text as it is generated. It ends with a line end where the statistics follow it, and not in a file."""
    last = ""
    for step in steps:
        print(step.text, end="", flush=True)
        last = step.text or last
    if not last.endswith("\n") and (sys.stdout.isatty() or (sys.stderr and os.path.sameopenfile(1, 2))):
        print(flush=True)


def _print_json(prompt: list[int], steps: Iterator[Step], statistics: Statistics) -> None:
    done = list(steps)
    result: dict[str, Any] = {"prompt_ids": prompt, **steps_to_json(done)}
    if done[0].logprob is not None:
        result["logprobs"] = [{"logprob": step.logprob, "top_logprobs": step.top_logprobs} for step in done]
    result["timings"] = {
        "load": statistics.load,
        "prefill": statistics.first_token,
        "decode": statistics.decode,
    }
    print(json.dumps(result, ensure_ascii=False))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command: prints the text to stdout and statistics to stderr.

    Returns:
        exit code 0; for bad input the command ends with 2.
    """
    options = _parser().parse_args(arguments)
    generation = _generation(options)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks become "?"
    text = valid(options.prompt)
    if options.prompt_file:
        text = read_text(options.prompt_file).removesuffix("\n").removesuffix("\r")
    start = time.perf_counter()
    program = open_program(options, options.file)
    load = time.perf_counter() - start
    prompt = options.prompt_ids or prompt_ids(program, text, options.parse_special)
    statistics = Statistics(load, len(prompt))
    generation = replace(generation, stop_ids=program.metadata.stop_ids, drafter=_drafter(options, program))
    constraint = _constraint(options, program, prompt)
    session = Session(program)
    if options.session and options.session.exists():
        session.load(options.session)
    steps = generate(session, prompt, generation, Rng(options.seed), program.tokenizer, constraint)
    steps = until_first("prefill", session.begin(prompt), steps)
    if options.format == "json":
        _print_json(prompt, _timed(steps, statistics), statistics)
    else:
        _print_text(_timed(steps, statistics))
    if options.session:
        session.save(options.session)
    print(statistics, file=sys.stderr)
    return 0


def _generation(options: argparse.Namespace) -> GenerationOptions:
    if options.logprobs is not None and options.format != "json":
        raise InputError(f"--logprobs {options.logprobs} is invalid for --format text; give --format json")
    return replace(generation_options(options), logprobs=options.logprobs, on_full=options.on_full)


def _drafter(options: argparse.Namespace, program: Program) -> Drafter | None:
    if options.draft:
        draft = open_program(options, options.draft)
        return Draft(draft, program.metadata.config.vocab_size)
    return Lookup() if options.lookup else None


def _constraint(options: argparse.Namespace, program: Program, prompt: list[int]) -> Constraint | None:
    if options.json_schema:
        grammar = json_schema(options.json_schema)
    elif options.regex is not None:
        grammar = regex(options.regex)
    else:
        return None
    metadata = program.metadata
    return Constraint(grammar, program.tokenizer, metadata.stop_ids, metadata.config.vocab_size, prompt)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.generate", "Continues a prompt with the model in a .pte file.", __doc__)
    add = parser.add_argument
    add("file", type=Path, help=".pte file, or folder of shards or slices")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="text to continue (default: none, only BOS)")
    add(
        "--parse-special",
        action="store_true",
        help="read special tokens such as </s> in the prompt as tokens, not as text",
    )
    of_file = "file with the text to continue, or - for standard input; one trailing line end is dropped"
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help=of_file)
    prompt.add_argument("--prompt-ids", type=_ids, metavar="IDS", help="token ids instead of text: 1,15043,3186")
    add_generation_flags(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="generate only JSON that follows the schema in this file"
    )
    form.add_argument("--regex", metavar="PATTERN", help="generate only text that matches as a whole")
    add(
        "--on-full",
        choices=("stop", "slide"),
        default="stop",
        help="when the context is full: end, or forget the older half of the text and continue (default: stop)",
    )
    guess = parser.add_mutually_exclusive_group()
    guess.add_argument("--lookup", action="store_true", help="speculative decoding from repeated text")
    guess.add_argument(
        "--draft", type=Path, metavar="FILE", help="speculative decoding with a smaller model's .pte file"
    )
    add(
        "--session",
        type=Path,
        metavar="FILE",
        help="load the KV cache from this file if it exists, and save it there at the end",
    )
    add(
        "--format",
        choices=("text", "json"),
        default="text",
        help="output format; json: one object with ids, text and timings (default: text)",
    )
    add("--logprobs", type=int, metavar="K", help="with --format json: each token's log-probability and the K highest")
    add_program_flags(parser)
    return parser


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is invalid; give whole numbers such as 1,15043") from None
