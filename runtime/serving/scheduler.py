"""Scheduler: the single thread that runs a program for several texts in turn, and its queue of jobs."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from model.errors import InputError
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.serving.session_pool import SessionPool
from runtime.text.constraint import Constraint
from runtime.text.generation import GenerationOptions, Step, embed, generate, score
from runtime.text.sampler import Rng


class QueueFullError(Exception):
    """Raised if the queue is full."""


class ClosedError(Exception):
    """Raised if the scheduler is closed."""


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


@dataclass
class Totals:
    """What a scheduler has done since its start.

    Attributes:
        requests: number of jobs that have ended with a finish_reason.
        prompt_tokens: number of prompt tokens that were run.
        cached_tokens: number of prompt tokens that were not run because a session had them cached.
        tokens: number of new tokens.
        prompt_seconds, seconds: see `Job`.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(eq=False)
class _Active:
    """A job that has a session, and an iterator over its steps; None stands for a part of the prompt."""

    job: Job
    session: Session
    steps: Iterator[Step | None]


class Scheduler:
    """A queue of jobs, started in order of arrival, and a thread that runs one step of each active job in turn.

    A step is one token, or a chunk of a prompt. So a long prompt does not block the other jobs.

    Attributes:
        sessions: maximum number of active jobs.
        totals: what was done so far.
    """

    def __init__(self, program: Program, sessions: int, max_queue: int) -> None:
        """Starts the thread.

        Args:
            sessions: maximum number of sessions, and so of active jobs.
            max_queue: maximum number of waiting jobs.

        Raises:
            InputError: the program was exported for several texts at once, or the number of sessions is invalid.
        """
        self._program, self._room = program, sessions + max_queue
        self.sessions = sessions
        self.totals = Totals()
        self._pool = SessionPool(program, sessions)
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        self._active = list[_Active]()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of active jobs, waiting jobs and sessions."""
        with self._changed:
            return {"active": len(self._active), "waiting": len(self._waiting), "sessions": len(self._pool)}

    def submit(self, job: Job, is_more: bool = False) -> None:
        """Appends a job to the queue.

        Args:
            is_more: whether an earlier job of the same request was accepted; then the limit does not apply.

        Raises:
            QueueFullError: the queue is full.
            ClosedError: `close` was called.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            if not is_more and len(self._active) + len(self._waiting) >= self._room:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancels a waiting or active job; an active one ends after its current step. Ignores a finished one."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Ends the thread after its current step, and delivers a ClosedError to all jobs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for job in [*self._waiting, *(active.job for active in self._active)]:
            _deliver(job, ClosedError())
        self._waiting.clear()
        self._active.clear()

    def _run(self) -> None:
        while self._admit():
            for active in list(self._active):
                self._advance(active)

    def _admit(self) -> bool:
        """Waits until there are jobs, and starts waiting jobs while sessions are free.

        Returns False if the scheduler is closed.
        """
        with self._changed:
            while not (self._closed or self._waiting or self._active):
                self._changed.wait()
            while self._waiting and self._pool.has_room and not self._closed:
                self._activate(self._waiting.popleft())
            return not self._closed

    def _activate(self, job: Job) -> None:
        try:
            is_whole = job.embeds or job.scores is not None  # and nothing of the prompt may come from a cache
            session = self._pool.take(job.prompt[:1] if is_whole else job.prompt)
        except Exception as error:  # for example out of memory
            _deliver(job, error)
            return
        job.cached = session.position
        self._active.append(_Active(job, session, self._steps(job, session)))

    def _steps(self, job: Job, session: Session) -> Iterator[Step | None]:
        """Yields None for each chunk of the prompt except the last, and then the steps of the new tokens."""
        if job.embeds:
            for vector in embed(session, job.prompt):
                job.vector = vector
                yield None if vector is None else Step(job.prompt[-1], "", "stop")
            return
        if job.scores is not None:
            for part in score(session, job.prompt, job.scores, self._program.tokenizer):
                job.scored += part
                yield None
        for _ in session.begin(job.prompt):
            yield None
        yield from generate(session, job.prompt, job.options, job.rng, self._program.tokenizer, job.constraint)

    def _advance(self, active: _Active) -> None:
        """Runs the next step of a job and delivers it; ends the job after its last step or if it was cancelled."""
        job, begun = active.job, time.perf_counter()
        try:
            step = None if job.cancelled else next(active.steps)
        except Exception as error:  # no error may stop the other jobs
            self._end(active, failed=not isinstance(error, InputError))
            _deliver(job, error)
            return
        self._count(job, step, time.perf_counter() - begun)
        if job.cancelled or (step and step.finish_reason):
            self._end(active)
        if step:
            _deliver(job, step)

    def _count(self, job: Job, step: Step | None, seconds: float) -> None:
        """Adds the time of a step, and what it did, to the job and the totals."""
        totals = self.totals
        if job.made:
            job.seconds += seconds
            totals.seconds += seconds
        else:
            job.prompt_seconds += seconds
            totals.prompt_seconds += seconds
        if step is None:
            return
        job.made += 1
        if job.made == 1:
            totals.prompt_tokens += len(job.prompt) - job.cached
            totals.cached_tokens += job.cached
        totals.tokens += not job.embeds
        totals.requests += step.finish_reason is not None

    def _end(self, active: _Active, failed: bool = False) -> None:
        with self._changed:
            self._active.remove(active)
            (self._pool.discard if failed else self._pool.give_back)(active.session)


def _deliver(job: Job, item: Step | Exception) -> None:
    if not job.cancelled:
        job.deliver(item)
