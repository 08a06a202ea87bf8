"""Jobs, and the two ways to run several of them: each in a session in turn, or together in the lanes of one program."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from model.errors import InputError
from preproc.tokenizer import StreamDecoder
from runtime.engine.batched_session import BatchedSession
from runtime.engine.program import Program
from runtime.engine.session import Session, common
from runtime.serving.session_pool import WORTH_COPYING, SessionPool
from runtime.text.constraint import Constraint
from runtime.text.generation import Generation, GenerationOptions, Step, check_ids, embed, generate, score
from runtime.text.sampler import Rng, logprobs

SESSIONS = 4
"""Number of sessions, if nothing else is wanted."""


@dataclass(eq=False)
class Job:
    """A text to generate.

    Attributes:
        prompt: the ids of the prompt, which fit in the context.
        options, rng, constraint: see `generate`.
        deliver: called with each step, the last of which has a finish_reason, or with the error that ended the job. The
            caller is the scheduler's thread or `Scheduler.close`; it must return at once.
        scores: number of likeliest tokens to report for each of the prompt's own tokens, see `score`; None for no
            scores.
        scored: the steps of the prompt's own tokens, if `scores` is set; complete when the first step is delivered.
        cached: number of prompt tokens that were not run because a session had them cached; known when the first step
            is delivered.
        embeds: whether the prompt's vector is made instead of new tokens; one step without text then ends the job.
        vector: the prompt's vector, see `embed`; known when that step is delivered.
        made: number of steps so far.
        prompt_seconds: time of running the prompt, with the first step.
        seconds: time of the other steps.
        cancelled: whether the job was cancelled, so that nothing more is delivered.
    """

    prompt: Sequence[int]
    options: GenerationOptions
    rng: Rng
    constraint: Constraint | None
    deliver: Callable[[Step | Exception], None]
    scores: int | None = None
    scored: list[Step] = field(default_factory=list)
    cached: int = 0
    embeds: bool = False
    vector: Tensor | None = None
    made: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    cancelled: bool = False

    @property
    def reusable(self) -> Sequence[int]:
        """The beginning of the prompt that may come from a cache, and one token that is run for its logits."""
        return self.prompt[:1] if self.embeds or self.scores is not None else self.prompt


class Turn(NamedTuple):
    """What one run of the program gave to a job.

    Attributes:
        result: the next step; None if the prompt is not complete, or the job was cancelled; or the error that ends the
            job.
        seconds: time that it took; of a run for several jobs, an equal share.
    """

    job: Job
    result: Step | Exception | None
    seconds: float = 0.0


class Runner(ABC):
    """Runs several jobs step by step.

    Attributes:
        limit: maximum number of jobs at a time.
    """

    limit: int

    @property
    @abstractmethod
    def jobs(self) -> Sequence[Job]:
        """The jobs that have started and not ended."""

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of texts whose KV caches are kept."""

    @abstractmethod
    def start(self, job: Job) -> None:
        """Starts a job, of which there are fewer than `limit`.

        Raises:
            InputError: the job cannot be run.
        """

    @abstractmethod
    def turns(self) -> Iterator[Turn]:
        """Runs a step of every job. The caller ends jobs whose result is an error or the last step, or that were
        cancelled, before it asks for the next turn.
        """

    @abstractmethod
    def end(self, job: Job, failed: bool) -> None:
        """Ends a job.

        Args:
            failed: whether the text in its cache may be incomplete.
        """


def runner(program: Program, sessions: int | None) -> Runner:
    """Returns the runner for a program.

    Args:
        sessions: maximum number of jobs at a time; None for a default.

    Raises:
        InputError: the number is invalid for the program.
    """
    lanes = program.metadata.batch_size
    if lanes == 1:
        return SessionRunner(program, SESSIONS if sessions is None else sessions)
    if sessions not in (None, lanes):
        raise InputError(
            f"--sessions {sessions} is invalid, because the file was exported for {lanes} texts at once; give {lanes}, "
            "or leave it out"
        )
    return LaneRunner(program)


class SessionRunner(Runner):
    """Runs jobs in turn, each in a session of its own. A step is one token, or a chunk of a prompt, so that a long
    prompt does not block the other jobs.
    """

    def __init__(self, program: Program, sessions: int) -> None:
        self.limit = sessions
        self._tokenizer = program.tokenizer
        self._pool = SessionPool(program, sessions)
        self._sessions = dict[Job, Session]()
        self._steps = dict[Job, Iterator[Step | None]]()

    @property
    def jobs(self) -> Sequence[Job]:
        return list(self._sessions)

    def __len__(self) -> int:
        return len(self._pool)

    def start(self, job: Job) -> None:
        session = self._pool.take(job.reusable)
        job.cached = session.position
        self._sessions[job], self._steps[job] = session, self._made(job, session)

    def _made(self, job: Job, session: Session) -> Iterator[Step | None]:
        """Yields None for each chunk of the prompt except the last, and then the steps of the new tokens."""
        if job.embeds:
            for vector in embed(session, job.prompt):
                job.vector = vector
                yield None if vector is None else Step(job.prompt[-1], "", "stop")
            return
        if job.scores is not None:
            for part in score(session, job.prompt, job.scores, self._tokenizer):
                job.scored += part
                yield None
        for _ in session.begin(job.prompt):
            yield None
        yield from generate(session, job.prompt, job.options, job.rng, self._tokenizer, job.constraint)

    def turns(self) -> Iterator[Turn]:
        for job, steps in list(self._steps.items()):
            begun = time.perf_counter()
            try:
                result: Step | Exception | None = None if job.cancelled else next(steps)
            except Exception as error:  # no error may stop the other jobs
                result = error
            yield Turn(job, result, time.perf_counter() - begun)

    def end(self, job: Job, failed: bool) -> None:
        del self._steps[job]
        (self._pool.discard if failed else self._pool.give_back)(self._sessions.pop(job))


@dataclass(eq=False)
class _Lane:
    """A job in a lane of a batched program: its tokens that have not been run, and its generation."""

    number: int
    job: Job
    waiting: list[int]
    generation: Generation
    decoder: StreamDecoder | None

    def next(self, chunk: int) -> list[int]:
        """Returns the next tokens to run. A scored prompt is run token by token, because a step returns the logits
        after the last one only.
        """
        return self.waiting[: chunk if self.job.scores is None else 1]

    def take(self, count: int, logits: Tensor, full: bool) -> Step | None:
        """Returns the next step, if the prompt is complete, from the logits [V] after `count` tokens.

        Args:
            full: whether the context has no room for another token.
        """
        del self.waiting[:count]
        if not self.waiting:
            step = self.generation.take(logits, full)
            self.waiting = [step.token]
            return step
        if self.job.scores is not None:
            logprob, top = logprobs(logits, self.waiting[0], self.job.scores)
            self.job.scored.append(Step(self.waiting[0], self.shown(self.waiting[0]), None, logprob, top))
        return None

    def shown(self, token: int) -> str:
        """Returns the text that a token of a scored prompt completes."""
        return self.decoder.add(token) if self.decoder else ""


class LaneRunner(Runner):
    """Runs jobs together, each in a lane of a program that was exported for several texts at once, so that its weights
    are read once for all. A job starts as soon as a lane is free, while others go on.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._session = BatchedSession(program)
        self.limit = len(self._session)
        self._idle = list(range(self.limit))  # the least recently used first
        self._lanes = dict[Job, _Lane]()

    @property
    def jobs(self) -> Sequence[Job]:
        return list(self._lanes)

    def __len__(self) -> int:
        return self.limit

    def start(self, job: Job) -> None:
        assert not job.embeds, "a batched program returns no hidden states"
        tokenizer = self._program.tokenizer
        self._session.check(job.prompt)
        check_ids(job.options.sampling, self._program.metadata.config.vocab_size)
        generation = Generation(job.prompt, job.options, job.rng, tokenizer, job.constraint)
        number = self._place(job.reusable)
        job.cached = self._session.caches[number].position
        decoder = StreamDecoder(tokenizer) if tokenizer and job.scores is not None else None
        lane = _Lane(number, job, list(job.prompt[job.cached :]), generation, decoder)
        if job.scores is not None:
            job.scored.append(Step(job.prompt[0], lane.shown(job.prompt[0])))
        self._lanes[job] = lane

    def _place(self, prompt: Sequence[int]) -> int:
        """Takes an idle lane and leaves the longest beginning of the prompt in it that a lane has, without its last
        token: the lane's own or, if that has at least WORTH_COPYING more tokens in common, another's.
        """

        def shared(number: int) -> int:
            return common(self._session.texts[number], prompt[:-1])

        number, nearest = max(self._idle, key=shared), max(range(self.limit), key=shared)
        if shared(nearest) >= shared(number) + WORTH_COPYING:
            number = self._idle[0]
            self._session.copy(nearest, number)
        self._idle.remove(number)
        self._session.shorten(number, shared(number))
        return number

    def turns(self) -> Iterator[Turn]:
        lanes = list(self._lanes.values())
        yield from (Turn(lane.job, None) for lane in lanes if lane.job.cancelled)
        lanes = [lane for lane in lanes if not lane.job.cancelled]
        if not lanes:
            return
        texts = {lane.number: lane.next(self._session.chunk) for lane in lanes}
        begun = time.perf_counter()
        try:
            logits = self._session.step(texts)
        except Exception as error:
            yield from (Turn(lane.job, error) for lane in lanes)
            return
        seconds = (time.perf_counter() - begun) / len(lanes)
        for lane in lanes:
            number = lane.number
            try:
                result: Step | Exception | None = lane.take(
                    len(texts[number]), logits[number], self._session.is_full(number)
                )
            except Exception as error:  # no error may stop the other jobs
                result = error
            yield Turn(lane.job, result, seconds)

    def end(self, job: Job, failed: bool) -> None:
        number = self._lanes.pop(job).number
        if failed:
            self._session.reset(number)
        self._idle.append(number)
