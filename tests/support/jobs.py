"""Clients of a scheduler, without a server."""

import queue

from runtime.serving.running import Job
from runtime.serving.scheduler import Scheduler
from runtime.text.generation import GenerationOptions, Step
from runtime.text.sampler import Rng
from tests.support.serving import wait


class Client:
    """A client with one job."""

    def __init__(self, prompt: list[int], options: GenerationOptions, rng: Rng | None = None) -> None:
        self.items = queue.Queue[Step | Exception]()
        self.job = Job(prompt, options, rng or Rng(7), None, self.items.put)

    def steps(self) -> list[Step]:
        received = list[Step]()
        while not received or received[-1].finish_reason is None:
            item = self.items.get(timeout=60)
            if isinstance(item, Exception):
                raise item
            received.append(item)
        return received


def wait_for(scheduler: Scheduler, **counts: int) -> None:
    wait(lambda: counts.items() <= scheduler.counts.items(), lambda: f"{scheduler.counts}, not {counts}")
