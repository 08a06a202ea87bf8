"""Scheduler: the single thread that runs a program for several texts, and its queue of jobs."""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import InputError
from runtime.engine.program import Program
from runtime.serving.running import Job, Turn, runner
from runtime.text.generation import Step


class QueueFullError(Exception):
    """Raised if the queue is full."""


class ClosedError(Exception):
    """Raised if the scheduler is closed."""


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


class Scheduler:
    """A queue of jobs, started in order of arrival, and a thread that runs them, see `runtime.serving.running`.

    Attributes:
        sessions: maximum number of active jobs.
        totals: what was done so far.
    """

    def __init__(self, program: Program, sessions: int | None, max_queue: int) -> None:
        """Starts the thread.

        Args:
            sessions: see `runner`.
            max_queue: maximum number of waiting jobs.

        Raises:
            InputError: the number of sessions is invalid.
        """
        self._runner = runner(program, sessions)
        self.sessions = self._runner.limit
        self._room = self.sessions + max_queue
        self.totals = Totals()
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def active(self) -> Sequence[Job]:
        """The active jobs."""
        with self._changed:
            return self._runner.jobs

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of active jobs, waiting jobs and sessions."""
        with self._changed:
            return {"active": len(self._runner.jobs), "waiting": len(self._waiting), "sessions": len(self._runner)}

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
            if not is_more and len(self._runner.jobs) + len(self._waiting) >= self._room:
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
        jobs = self._runner.jobs
        for job in [*self._waiting, *jobs]:
            _deliver(job, ClosedError())
        self._waiting.clear()
        for job in jobs:
            self._end(job)

    def _run(self) -> None:
        while self._admit():
            for turn in self._runner.turns():
                self._take(turn)

    def _admit(self) -> bool:
        """Waits until there are jobs, and starts waiting jobs while there is room.

        Returns False if the scheduler is closed.
        """
        with self._changed:
            while not (self._closed or self._waiting or self._runner.jobs):
                self._changed.wait()
            while self._waiting and len(self._runner.jobs) < self.sessions and not self._closed:
                job = self._waiting.popleft()
                try:
                    self._runner.start(job)
                except Exception as error:  # for example out of memory
                    _deliver(job, error)
            return not self._closed

    def _take(self, turn: Turn) -> None:
        """Delivers the result of a job's turn; ends the job after its last step, an error, or if it was cancelled."""
        job, result, seconds = turn
        if isinstance(result, Exception):
            self._end(job, failed=not isinstance(result, InputError))
            _deliver(job, result)
            return
        self._count(job, result, seconds)
        if job.cancelled or (result and result.finish_reason):
            self._end(job)
        if result:
            _deliver(job, result)

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

    def _end(self, job: Job, failed: bool = False) -> None:
        with self._changed:
            self._runner.end(job, failed)


def _deliver(job: Job, item: Step | Exception) -> None:
    if not job.cancelled:
        job.deliver(item)
