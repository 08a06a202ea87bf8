"""Scheduler: the one thread that runs a program, for several texts in turns, and the queue in front of it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from model.errors import InputError
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.serving.session_pool import SessionPool
from runtime.text.constraint import Constraint
from runtime.text.generation import GenerationOptions, Step, generate, score
from runtime.text.sampler import Rng


class QueueFullError(Exception):
    """As many wait as may."""


class ClosedError(Exception):
    """The scheduler has ended, or ends."""


@dataclass(eq=False)
class Job:
    """A text to be generated.

    Attributes:
        prompt: its ids, which fit in the context.
        options, rng, constraint: see `generate`.
        deliver: is given each step, of which the last has a finish_reason, or what went wrong instead of it. It is
            called by the scheduler's thread, or by `Scheduler.close`, and returns at once.
        scores: of how many of the likeliest tokens the prompt's own are compared with, see `score`; None not to.
        scored: the prompt's steps, where they were asked for; complete with the first step.
        cached: how many of the prompt's tokens were not run, because a session began with them; known with the first
            step.
    """

    prompt: Sequence[int]
    options: GenerationOptions
    rng: Rng
    constraint: Constraint | None
    deliver: Callable[[Step | Exception], None]
    scores: int | None = None
    scored: list[Step] = field(default_factory=list)
    cached: int = 0
    cancelled: bool = False


@dataclass(eq=False)
class _Active:
    """A job that has a session, and its next steps: None where a part of the prompt was run."""

    job: Job
    session: Session
    steps: Iterator[Step | None]


class Scheduler:
    """Takes jobs first come, first served; those that have a session go on in turns, a step of each.

    A step is a token, or a part of a prompt as long as the program takes at once. So a long prompt holds nobody up.

    Attributes:
        sessions: how many jobs can be active.
    """

    def __init__(self, program: Program, sessions: int, max_queue: int) -> None:
        """Starts the thread.

        Args:
            sessions: how many texts are kept, and as many jobs are active at a time.
            max_queue: how many more may wait.

        Raises:
            InputError: the program takes no sessions, or so many are impossible.
        """
        self._program, self._room = program, sessions + max_queue
        self.sessions = sessions
        self._pool = SessionPool(program, sessions)
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        self._active = list[_Active]()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs are active and how many wait, and how many sessions there are."""
        with self._changed:
            return {"active": len(self._active), "waiting": len(self._waiting), "sessions": len(self._pool)}

    def submit(self, job: Job, is_more: bool = False) -> None:
        """Puts a job behind those that wait.

        Args:
            is_more: whether it belongs to one that was taken, so that there is a place.

        Raises:
            QueueFullError: there is no place.
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
        """Gives a job up, be it waiting, active or done; an active one after the step that it is in."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Ends: those that have jobs here are told, and the thread ends after the step that it is in."""
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
        """Gives sessions to those that wait, as long as there are some, and waits where nothing is to be done; whether
        to go on.
        """
        with self._changed:
            while not (self._closed or self._waiting or self._active):
                self._changed.wait()
            while self._waiting and self._pool.has_room and not self._closed:
                self._activate(self._waiting.popleft())
            return not self._closed

    def _activate(self, job: Job) -> None:
        try:
            session = self._pool.take(job.prompt if job.scores is None else job.prompt[:1])  # all of which is run
        except Exception as error:  # memory may be short
            _deliver(job, error)
            return
        job.cached = session.position
        self._active.append(_Active(job, session, self._steps(job, session)))

    def _steps(self, job: Job, session: Session) -> Iterator[Step | None]:
        """What a job takes: its prompt in parts but for the last, and then its tokens."""
        if job.scores is not None:
            for part in score(session, job.prompt, job.scores, self._program.tokenizer):
                job.scored += part
                yield None
        while len(job.prompt) - session.position > session.chunk:
            session.prefill(job.prompt[session.position : session.position + session.chunk])
            yield None
        yield from generate(session, job.prompt, job.options, job.rng, self._program.tokenizer, job.constraint)

    def _advance(self, active: _Active) -> None:
        """Runs the next step of a job and delivers it; ends the job after its last, or where it was cancelled."""
        try:
            step = None if active.job.cancelled else next(active.steps)
        except Exception as error:  # whatever it is, the other jobs go on
            self._end(active, failed=not isinstance(error, InputError))
            _deliver(active.job, error)
            return
        if active.job.cancelled or (step and step.finish_reason):
            self._end(active)
        if step:
            _deliver(active.job, step)

    def _end(self, active: _Active, failed: bool = False) -> None:
        with self._changed:
            self._active.remove(active)
            (self._pool.discard if failed else self._pool.give_back)(active.session)


def _deliver(job: Job, item: Step | Exception) -> None:
    if not job.cancelled:
        job.deliver(item)
