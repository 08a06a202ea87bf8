import random
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from model.errors import InputError
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.serving.scheduler import ClosedError, QueueFullError, Scheduler
from runtime.text.generation import GenerationOptions, Step, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.conftest import TOY
from tests.support.jobs import Client, Failing, check_scores, wait_for
from tests.support.serving import Gate

WARM = SamplingOptions(temperature=1.0)


@pytest.fixture
def scheduler(toy_program: Program) -> Iterator[Scheduler]:
    with closing(Scheduler(toy_program, sessions=2, max_queue=1)) as scheduler:
        yield scheduler


@pytest.fixture
def gate(toy_program: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(toy_program, monkeypatch)
    yield gate
    gate.open.set()


def test_interleaved_texts_equal_those_run_alone(toy_program: Program) -> None:
    chance = random.Random(5)
    clients = list[Client]()
    for seed in range(40):
        prompt = list(range(1, chance.randrange(2, 12))) + [chance.randrange(99) for _ in range(chance.randrange(30))]
        clients.append(Client(prompt, GenerationOptions(WARM, chance.randrange(1, 20)), Rng(seed)))
    with closing(Scheduler(toy_program, sessions=3, max_queue=100)) as scheduler:
        for client in clients:
            scheduler.submit(client.job)
        found = [[step.token for step in client.steps()] for client in clients]
        assert scheduler.counts == {"active": 0, "waiting": 0, "sessions": 3}
    for seed, (client, tokens) in enumerate(zip(clients, found, strict=True)):
        alone = generate(Session(toy_program), client.job.prompt, client.job.options, Rng(seed), toy_program.tokenizer)
        assert [step.token for step in alone] == tokens
    assert sum(client.job.cached for client in clients) > 40


@pytest.mark.parametrize("length", [1, 2, 8, 30])
def test_prompt_scores_are_those_of_the_eager_model(scheduler: Scheduler, length: int) -> None:
    check_scores(scheduler, length)


def test_a_short_text_does_not_wait_for_a_long_one_or_a_long_prompt(scheduler: Scheduler, gate: Gate) -> None:
    order = list[str]()

    def noting(name: str, prompt: list[int], tokens: int) -> Client:
        client = Client(prompt, GenerationOptions(max_new_tokens=tokens))
        put = client.job.deliver

        def deliver(item: Step | Exception) -> None:
            order.append(name)
            put(item)

        client.job.deliver = deliver
        scheduler.submit(client.job)
        return client

    clients = [noting("long", list(range(40)), 9), noting("short", [1], 3)]
    gate.open.set()
    for client in clients:
        client.steps()
    assert order[:3] == ["short"] * 3  # between chunks of the long prompt, of 7 tokens each
    assert order[3:] == ["long"] * 9


def test_past_the_limit_a_job_is_refused(scheduler: Scheduler, gate: Gate) -> None:
    clients = [Client([token], GenerationOptions(max_new_tokens=2)) for token in range(4)]
    for client in clients[:3]:
        scheduler.submit(client.job)
    with pytest.raises(QueueFullError):
        scheduler.submit(clients[3].job)
    gate.open.set()
    assert [len(client.steps()) for client in clients[:3]] == [2, 2, 2]
    scheduler.submit(clients[3].job)
    assert len(clients[3].steps()) == 2


def test_a_cancelled_job_ends_whether_waiting_or_active(scheduler: Scheduler, gate: Gate) -> None:
    clients = [Client([token], GenerationOptions()) for token in range(3)]
    for client in clients:
        scheduler.submit(client.job)
    wait_for(scheduler, active=2, waiting=1)
    scheduler.cancel(clients[2].job)
    assert scheduler.counts["waiting"] == 0
    for client in clients[:2]:
        scheduler.cancel(client.job)
    gate.open.set()
    wait_for(scheduler, active=0)
    assert gate.steps <= 2
    assert all(client.items.empty() for client in clients)


def test_a_failure_ends_one_job_and_its_session(scheduler: Scheduler) -> None:
    failing, other = (Client([1, 2], GenerationOptions(WARM, 30), rng) for rng in (Failing(0), Rng(0)))
    scheduler.submit(failing.job)
    scheduler.submit(other.job)
    with pytest.raises(RuntimeError, match="no luck"):
        failing.steps()
    assert len(other.steps()) == 30
    assert scheduler.counts == {"active": 0, "waiting": 0, "sessions": 1}


def test_bad_input_ends_one_job_and_leaves_its_session(scheduler: Scheduler) -> None:
    wrong = Client([1, 2], GenerationOptions(replace(WARM, logit_bias={TOY.vocab_size: 1.0})))
    scheduler.submit(wrong.job)
    with pytest.raises(InputError, match="logit-bias"):
        wrong.steps()
    assert scheduler.counts == {"active": 0, "waiting": 0, "sessions": 1}


def test_closing_ends_all_waiting_jobs(toy_program: Program, gate: Gate) -> None:
    scheduler = Scheduler(toy_program, sessions=1, max_queue=1)
    clients = [Client([token], GenerationOptions()) for token in range(2)]
    for client in clients:
        scheduler.submit(client.job)
    wait_for(scheduler, active=1)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    gate.open.set()
    closing.join(60)
    for client in clients:
        with pytest.raises(ClosedError):
            client.steps()
    with pytest.raises(ClosedError):
        scheduler.submit(Client([1], GenerationOptions()).job)
    scheduler.close()
