"""The command that continues many texts at once, and batch(): each as it would be alone, together in time.

python -m export.llama --batch-size 8 --output batch.pte
python -m runtime.batch batch.pte --prompts-file prompts.txt --max-new-tokens 50
python -m runtime.batch batch.pte --prompts-file prompts.jsonl --temperature 0.8 > results.jsonl

A prompts file has a text in each line, or in each line an object such as {"prompt": "Once"} or {"prompt_ids": [1, 2]}.
"""

from model import command

if __name__ == "__main__":
    command.start("runtime.batch")

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model.errors import InputError
from runtime.flags import add_generation_flags, add_program_flags, generation_options, open_program
from runtime.generate import prompt_ids, read_text
from runtime.generation import Generation, GenerationOptions, Step, check_ids, told
from runtime.lanes import Lanes
from runtime.meter import peak_memory
from runtime.program import Program
from runtime.sampler import Rng


@dataclass
class Result:
    """What became of a prompt.

    Attributes:
        number: which of the prompts, counted from 0.
        steps: what follows it.
        error: why it could not be run; then there are no steps.
    """

    number: int
    steps: list[Step] = field(default_factory=list)
    error: str | None = None


@dataclass
class _Active:
    """A text in a lane: what has not been run of it yet, and what chooses its tokens."""

    result: Result
    waiting: list[int]
    generation: Generation


def batch(
    program: Program, prompts: Sequence[Sequence[int] | InputError], options: GenerationOptions, seed: int = 0
) -> Iterator[Result]:
    """Continues every prompt, as many at once as the program has lanes, and yields the results in their order.

    A prompt that cannot be run, or an error in its place, becomes a result; the others go on. Each has random numbers
    of its own, from the same seed, so that it is what `generate` makes of it.

    Raises:
        InputError: an option needs what is not there.
    """
    check_ids(options.sampling, program.metadata.config.vocab_size)
    return in_order(_ended(program, prompts, options, seed))


def in_order(results: Iterable[Result]) -> Iterator[Result]:
    """Each as soon as it and all before it have come."""
    come, number = dict[int, Result](), 0
    for result in results:
        come[result.number] = result
        while number in come:
            yield come.pop(number)
            number += 1


def _ended(
    program: Program, prompts: Sequence[Sequence[int] | InputError], options: GenerationOptions, seed: int
) -> Iterator[Result]:
    """The results of `batch` as texts end."""
    lanes, active, waiting = Lanes(program), dict[int, _Active](), enumerate(prompts)
    while True:
        for lane in range(len(lanes)):
            while lane not in active and (following := next(waiting, None)):
                started = _start(program, lanes, *following, options, seed)
                if isinstance(started, Result):
                    yield started
                else:
                    lanes.reset(lane)
                    active[lane] = started
        if not active:
            return
        for lane in _step(lanes, active):
            yield active.pop(lane).result


def _start(
    program: Program,
    lanes: Lanes,
    number: int,
    prompt: Sequence[int] | InputError,
    options: GenerationOptions,
    seed: int,
) -> _Active | Result:
    try:
        if isinstance(prompt, InputError):
            raise prompt
        lanes.check(prompt)
        generation = Generation(prompt, options, Rng(seed), program.tokenizer)
    except InputError as error:
        return Result(number, error=str(error))
    return _Active(Result(number), list(prompt), generation)


def _step(lanes: Lanes, active: dict[int, _Active]) -> list[int]:
    """Runs one step, and returns the lanes whose text has ended.

    A step costs as much as its longest part does in every lane. So prompts are run whole only while nothing else is
    decoded, and otherwise token by token beside it, which costs nothing: weights are read for the others anyway.
    """
    prefilling = all(len(each.waiting) > 1 for each in active.values())
    count = lanes.chunk if prefilling else 1
    logits = lanes.step({lane: each.waiting[:count] for lane, each in active.items()})
    ended = []
    for lane, each in active.items():
        del each.waiting[:count]
        if each.waiting:
            continue
        step = each.generation.take(logits[lane], full=lanes.is_full(lane))
        each.result.steps.append(step)
        each.waiting = [step.token]
        if step.finish_reason:
            ended.append(lane)
    return ended


def read_prompts(path: Path, program: Program) -> list[Sequence[int] | InputError]:
    """The ids of each prompt in a file, or what is wrong with it.

    Raises:
        InputError: the file cannot be read, or has no prompts.
    """
    text = read_text(path)
    lines = {number: line.removesuffix("\r") for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise InputError(f"{path} has no prompts; give one in each line")
    first = next(iter(lines.values()))
    if path.suffix == ".jsonl" or isinstance(_object(first), dict):
        return [_ids(number, _object(line), program) for number, line in lines.items()]
    return [_ids(number, {"prompt": line}, program) for number, line in lines.items()]


def _object(line: str) -> Any:
    """What a line of JSON holds, or what is wrong with it."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"is no JSON ({error})")


def _ids(number: int, prompt: Any, program: Program) -> Sequence[int] | InputError:
    if isinstance(prompt, InputError):
        return InputError(f"line {number} {prompt}; give an object in each line")
    text, ids = (prompt.get(key) if isinstance(prompt, dict) else None for key in ("prompt", "prompt_ids"))
    if isinstance(ids, list) and all(type(token) is int for token in ids):
        return ids
    if not isinstance(text, str):
        return InputError(
            f'line {number}, {json.dumps(prompt)}, is no prompt; give an object with "prompt" or "prompt_ids"'
        )
    try:
        return prompt_ids(program, text)
    except InputError as error:
        return error


def print_results(results: Iterable[Result], where: str, known: int = 0) -> int:
    """Prints a JSON object for each to stdout, and the throughput to stderr; returns the command's exit code.

    Args:
        where: what ran them, for the throughput's line.
        known: of the tokens, how many an earlier run chose.
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
    return {"number": result.number, **told(result.steps)}


def main(arguments: list[str] | None = None) -> int:
    """The command: a JSON object for each prompt to stdout, in their order, and the throughput to stderr; exit code 0,
    1 where a prompt could not be run, or 2 for bad input.
    """
    options = _parser().parse_args(arguments)
    generation = generation_options(options)
    program = open_program(options, options.file)
    generation = replace(generation, stop_ids=program.metadata.stop_ids)
    prompts = read_prompts(options.prompts_file, program)
    results = batch(program, prompts, generation, options.seed)
    return print_results(results, f"{program.metadata.batch_size} at once")


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.batch", "Continues many texts at once.", __doc__)
    add = parser.add_argument
    add("file", type=Path, help="the .pte, exported with --batch-size")
    add("--prompts-file", type=Path, required=True, metavar="FILE", help="a prompt in each line, or an object of JSON")
    add_generation_flags(parser)
    add_program_flags(parser)
    return parser
