"""Jobs: the texts of one request, which a scheduler generates at the same time."""

import asyncio
from collections.abc import AsyncIterator

from torch import Tensor

from runtime.serving.openai_request import CompletionRequest
from runtime.serving.request_body import RequestError
from runtime.serving.running import Job
from runtime.serving.scheduler import ClosedError, QueueFullError, Scheduler
from runtime.text.generation import Step
from runtime.text.sampler import Rng

RESTARTED = "the server is shutting down; try again later"


class Jobs:
    """The jobs of one request, and an iterator over their steps. The caller must call `cancel` when it has finished.

    At most as many jobs are submitted at a time as the scheduler has sessions. If several jobs have the same prompt,
    the first runs it, and the others begin afterwards and reuse its cache.
    """

    def __init__(self, request: CompletionRequest, scheduler: Scheduler) -> None:
        """Submits the first jobs.

        Raises:
            RequestError: the queue is full, or the scheduler is closed.
        """
        self._loop = asyncio.get_running_loop()
        self._items = asyncio.Queue[tuple[int, Step] | Exception]()
        self._scheduler, self._tries = scheduler, request.tries
        self._jobs = [self._job(request, number) for number in range(len(request.texts))]
        self._submitted = self._ended = 0
        self._begun = set[int]()  # indices of prompts that have been run
        self._is_cancelled = False
        try:
            self._go_on()
        except QueueFullError:
            raise RequestError(429, "too many requests are waiting; try again later", code="queue_full") from None
        except ClosedError:
            raise RequestError(503, RESTARTED) from None

    @property
    def cached(self) -> int:
        """Number of prompt tokens that were not run because they were cached; known after the last step."""
        return sum(job.cached for job in self._jobs[:: self._tries])

    def scored(self, prompt: int) -> list[Step]:
        """Returns the steps of a prompt's own tokens, if requested; known after the prompt's first new token."""
        return self._jobs[prompt * self._tries].scored

    def vector(self, prompt: int) -> Tensor:
        """Returns the vector of a prompt, if requested, [D]; known after the last step."""
        vector = self._jobs[prompt * self._tries].vector
        assert vector is not None, "no vector was made"
        return vector

    @property
    def timings(self) -> dict[str, float]:
        """The numbers and times of tokens under the names of llama.cpp's server; known after the last step.

        Times are those of this request's steps, without those of others in between.
        """
        cached = sum(job.cached for job in self._jobs)
        ran, made = sum(len(job.prompt) for job in self._jobs) - cached, sum(job.made for job in self._jobs)
        before, after = (sum(getattr(job, name) for job in self._jobs) for name in ("prompt_seconds", "seconds"))
        return {
            "cache_n": cached,
            **_timing("prompt", ran, before),
            **_timing("predicted", made, after),
        }

    def fail(self, error: Exception) -> None:
        """Ends the iteration over steps with an error."""
        self._items.put_nowait(error)

    def cancel(self) -> None:
        """Cancels the jobs that have not finished."""
        self._is_cancelled = True
        for job in self._jobs[: self._submitted]:
            self._scheduler.cancel(job)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Step]]:
        """Yields steps as they are generated, each with the index of its text."""
        while self._ended < len(self._jobs) or not self._items.empty():
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def _job(self, request: CompletionRequest, number: int) -> Job:
        text = request.texts[number]
        scores = request.logprobs if request.scores_prompts and number % request.tries == 0 else None

        def deliver(item: Step | Exception) -> None:
            if not self._loop.is_closed():  # a closed loop has no waiting request
                self._loop.call_soon_threadsafe(self._take, number, item)

        prompt = request.prompts[text.prompt]
        return Job(prompt, request.options, Rng(text.seed), text.constraint, deliver, scores, embeds=request.embeds)

    def _take(self, number: int, item: Step | Exception) -> None:
        """Takes a step or an error from a job."""
        if isinstance(item, Exception):
            self.fail(item)
            return
        self._items.put_nowait((number, item))
        self._begun.add(number // self._tries)
        self._ended += item.finish_reason is not None
        if not self._is_cancelled:
            try:
                self._go_on()
            except ClosedError as error:
                self.fail(error)

    def _go_on(self) -> None:
        """Submits the jobs that can run now."""
        while self._submitted < min(len(self._jobs), self._ended + self._scheduler.sessions):
            prompt, place = divmod(self._submitted, self._tries)
            if place and prompt not in self._begun:
                return
            self._scheduler.submit(self._jobs[self._submitted], is_more=self._submitted > 0)
            self._submitted += 1


def _timing(name: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": seconds * 1e3,
        f"{name}_per_token_ms": seconds * 1e3 / count if count else 0.0,
        f"{name}_per_second": count / seconds if seconds else 0.0,
    }
