"""Clients of a scheduler, without a server."""

import queue

import pytest

from export.quality.eager import reference
from runtime.serving.running import Job
from runtime.serving.scheduler import Scheduler
from runtime.text.generation import GenerationOptions, Step
from runtime.text.sampler import Rng
from tests.conftest import TOY, toy_model
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


class Failing(Rng):
    """A source of random numbers that fails."""

    def coin(self) -> float:
        raise RuntimeError("no luck")


def check_scores(scheduler: Scheduler, length: int) -> None:
    """Checks that a job's scores of a prompt of TOY are those of the eager model."""
    prompt = [(token * 37) % TOY.vocab_size for token in range(1, length + 1)]
    clients = [Client(prompt, GenerationOptions(max_new_tokens=3)) for _ in range(2)]
    clients[1].job.scores = 2
    for client in clients:  # one after the other, so that the second could reuse the first one's cache
        scheduler.submit(client.job)
        client.steps()
    scored = clients[1].job.scored
    assert (clients[0].job.scored, clients[1].job.cached) == ([], 0)
    assert [step.token for step in scored] == prompt
    assert (scored[0].logprob, scored[0].top_logprobs) == (None, ())
    (logits,) = reference(toy_model(), [prompt], max_seq_len=TOY.context)
    logprobs = logits.double().log_softmax(-1)
    for step, token, row in zip(scored[1:], prompt[1:], logprobs, strict=False):
        assert step.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [value for _, value in step.top_logprobs] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
