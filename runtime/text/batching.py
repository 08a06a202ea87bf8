"""batch(): many texts at once, each as it would be alone, together in time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from model.errors import InputError
from runtime.engine.batched_session import BatchedSession
from runtime.engine.program import Program
from runtime.text.generation import Generation, GenerationOptions, Step, check_ids
from runtime.text.sampler import Rng


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
    """Runs one step, and returns the lanes whose text has ended.

    A step costs as much as its longest part does in every lane. So prompts are run whole only while nothing else is
    decoded, and otherwise token by token beside it, which costs nothing: weights are read for the others anyway.
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
