"""Generates several texts at once; each is the same as if it had been generated alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from model.errors import InputError
from runtime.engine.batched_session import BatchedSession
from runtime.engine.program import Program
from runtime.text.generation import Generation, GenerationOptions, Step, check_ids
from runtime.text.sampler import Rng


@dataclass
class Result:
    """The result of one prompt.

    Attributes:
        number: index of the prompt, from 0.
        steps: the generated tokens.
        error: why the prompt could not be run, or None; with an error there are no steps.
    """

    number: int
    steps: list[Step] = field(default_factory=list)
    error: str | None = None


@dataclass
class _Active:
    """A text in a lane: its result so far, its tokens that have not been run yet, and its generation."""

    result: Result
    waiting: list[int]
    generation: Generation


def batch(
    program: Program, prompts: Sequence[Sequence[int] | InputError], options: GenerationOptions, seed: int = 0
) -> Iterator[Result]:
    """Continues every prompt, as many at once as the program has lanes, and yields the results in the prompts' order.

    A prompt that cannot be run, or an error in place of a prompt, becomes a result with that error; the others go on.
    Each text has its own random numbers from the same seed, so that it equals the output of `generate`.

    Raises:
        InputError: logit_bias has an id that is not in the vocabulary.
    """
    check_ids(options.sampling, program.metadata.config.vocab_size)
    return in_order(_ended(program, prompts, options, seed))


def in_order(results: Iterable[Result]) -> Iterator[Result]:
    """Yields results in the order of their numbers, each as soon as it and all before it have arrived."""
    come, number = dict[int, Result](), 0
    for result in results:
        come[result.number] = result
        while number in come:
            yield come.pop(number)
            number += 1


def _ended(
    program: Program, prompts: Sequence[Sequence[int] | InputError], options: GenerationOptions, seed: int
) -> Iterator[Result]:
    """Yields the results of `batch` in the order in which texts end."""
    session, active, waiting = BatchedSession(program), dict[int, _Active](), enumerate(prompts)
    while True:
        for lane in range(len(session)):
            while lane not in active and (following := next(waiting, None)):
                started = _start(program, session, *following, options, seed)
                if isinstance(started, Result):
                    yield started
                else:
                    session.reset(lane)
                    active[lane] = started
        if not active:
            return
        for lane in _step(session, active):
            yield active.pop(lane).result


def _start(
    program: Program,
    session: BatchedSession,
    number: int,
    prompt: Sequence[int] | InputError,
    options: GenerationOptions,
    seed: int,
) -> _Active | Result:
    try:
        if isinstance(prompt, InputError):
            raise prompt
        session.check(prompt)
        generation = Generation(prompt, options, Rng(seed), program.tokenizer)
    except InputError as error:
        return Result(number, error=str(error))
    return _Active(Result(number), list(prompt), generation)


def _step(session: BatchedSession, active: dict[int, _Active]) -> list[int]:
    """Runs one step and returns the lanes whose text has ended.

    A step takes as long as if every lane had as many tokens as the longest. So prompts are run in chunks only while no
    lane decodes; otherwise they are run token by token, which takes no extra time because the step reads the weights
    for the decoding lanes anyway.
    """
    prefilling = all(len(each.waiting) > 1 for each in active.values())
    count = session.chunk if prefilling else 1
    logits = session.step({lane: each.waiting[:count] for lane, each in active.items()})
    ended = []
    for lane, each in active.items():
        del each.waiting[:count]
        if each.waiting:
            continue
        step = each.generation.take(logits[lane], full=session.is_full(lane))
        each.result.steps.append(step)
        each.waiting = [step.token]
        if step.finish_reason:
            ended.append(lane)
    return ended
