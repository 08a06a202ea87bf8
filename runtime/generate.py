"""The command that runs a .pte, and generate(): a text one typed step at a time.

python -m runtime.generate tiny.pte --prompt "Once upon a time"
python -m runtime.generate tiny.pte --prompt "The dog" --temperature 0.8 --top-p 0.9 --seed 7 --max-new-tokens 100
"""

from model import command

if __name__ == "__main__":
    command.start("runtime.generate")

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from model.errors import InputError
from preproc.tokenizer import StreamDecoder, Tokenizer
from runtime.meter import peak_memory
from runtime.program import Program
from runtime.sampler import Rng, SamplingOptions, sample
from runtime.session import Session


@dataclass(frozen=True)
class Step:
    """One generated token.

    Attributes:
        token: its id.
        text: the text it completes; empty while a UTF-8 character is open, and for a stop token.
        finish_reason: "stop" after a stop token, "length" when max_new_tokens or the context is used up, else None.
    """

    token: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class GenerationOptions:
    """How to choose tokens and when to end.

    Attributes:
        sampling: see `SamplingOptions`.
        max_new_tokens: None for as many as the context holds.
        stop_ids: ids that end the text.
    """

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens} is impossible; give 1 or more")


def generate(
    session: Session, prompt: Sequence[int], options: GenerationOptions, rng: Rng, tokenizer: Tokenizer | None = None
) -> Iterator[Step]:
    """Appends the prompt and yields what follows it.

    Of P prompt tokens in a context of T, T - P + 1 tokens can follow: the last needs no place of its own.

    Raises:
        InputError: the prompt is empty or does not fit; see `Session.prefill`.
    """
    logits = session.prefill(prompt)
    decoder = StreamDecoder(tokenizer, prompt) if tokenizer else None
    count = 0
    while True:
        token = sample(logits, options.sampling, rng)
        count += 1
        stop = token in options.stop_ids
        end = stop or count == options.max_new_tokens or session.position == session.capacity
        text = decoder.add(token) if decoder and not stop else ""
        if end:
            yield Step(token, text + (decoder.finish() if decoder else ""), "stop" if stop else "length")
            return
        yield Step(token, text)
        logits = session.decode(token)


def prompt_ids(program: Program, text: str, parse_special: bool = False) -> list[int]:
    """The ids of a prompt, BOS first where the model has one; see `Tokenizer.encode` for parse_special.

    Raises:
        InputError: the file carries no tokenizer.
    """
    if program.tokenizer is None:
        raise InputError("the file carries no tokenizer; give --prompt-ids, or export again with --tokenizer")
    text = os.fsencode(text).decode("utf-8", "replace")  # a shell may pass any bytes
    bos_id = program.metadata.bos_id
    return ([] if bos_id is None else [bos_id]) + program.tokenizer.encode(text, parse_special)


@dataclass
class Statistics:
    """What a run took. Seconds unless named otherwise."""

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
    for step in steps:
        print(step.text, end="", flush=True)
    if sys.stdout.isatty():
        print()


def _print_json(prompt: list[int], steps: Iterator[Step], statistics: Statistics) -> None:
    done = list(steps)
    result = {
        "prompt_ids": prompt,
        "token_ids": [step.token for step in done],
        "text": "".join(step.text for step in done),
        "finish_reason": done[-1].finish_reason,
        "timings": {"load": statistics.load, "prefill": statistics.first_token, "decode": statistics.decode},
    }
    print(json.dumps(result, ensure_ascii=False))


def main(arguments: list[str] | None = None) -> int:
    """The command: text to stdout, statistics to stderr; exit code 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    sampling = SamplingOptions(options.temperature, options.top_k, options.top_p)
    generation = GenerationOptions(sampling, options.max_new_tokens)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another
    start = time.perf_counter()
    program = Program(options.file, threads=options.threads, check=not options.no_check)
    load = time.perf_counter() - start
    prompt = options.prompt_ids or prompt_ids(program, options.prompt, options.parse_special)
    statistics = Statistics(load, len(prompt))
    generation = replace(generation, stop_ids=program.metadata.stop_ids)
    steps = generate(Session(program), prompt, generation, Rng(options.seed), program.tokenizer)
    if options.format == "json":
        _print_json(prompt, _timed(steps, statistics), statistics)
    else:
        _print_text(_timed(steps, statistics))
    print(statistics, file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.generate", "Runs an exported .pte.", __doc__)
    add = parser.add_argument
    add("file", type=Path, help="the .pte")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="text to continue (default: none, only BOS)")
    add("--parse-special", action="store_true", help="let the prompt's text name special tokens, such as </s>")
    prompt.add_argument("--prompt-ids", type=_ids, metavar="IDS", help="token ids in place of a text: 1,15043,3186")
    add("--max-new-tokens", type=int, metavar="N", help="default: as many as the context holds")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)")
    add("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens up to probability P")
    add("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="default: one per core")
    add("--format", choices=("text", "json"), default="text", help="json: one object with ids, text and timings")
    add("--no-check", action="store_true", help="skip the checksum, which reads the file through once")
    return parser


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ids; give whole numbers such as 1,15043") from None
