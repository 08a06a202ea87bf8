"""Tests jobs that run together in the lanes of one program; tests/runtime/test_scheduler.py has those in sessions."""

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from model.errors import InputError
from preproc.jinja_template import from_file
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.serving.running import runner
from runtime.serving.scheduler import Scheduler
from runtime.serving.served_model import Model
from runtime.text.generation import GenerationOptions, Step, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.conftest import TOY
from tests.support.jobs import Client, Failing, check_scores, wait_for
from tests.support.serving import Gate, serving

WARM = SamplingOptions(temperature=1.0)


@pytest.fixture(scope="module")
def program(three_toys: Path) -> Program:
    return Program(three_toys)


@pytest.fixture
def scheduler(program: Program) -> Iterator[Scheduler]:
    with closing(Scheduler(program, sessions=None, max_queue=100)) as scheduler:
        yield scheduler


@pytest.fixture
def gate(program: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(program, monkeypatch)
    yield gate
    gate.open.set()


def test_texts_in_lanes_equal_those_run_alone(scheduler: Scheduler, toy_program: Program) -> None:
    chance, clients = random.Random(5), list[Client]()
    for seed in range(40):
        prompt = list(range(1, chance.randrange(2, 25))) + [chance.randrange(99) for _ in range(chance.randrange(20))]
        clients.append(Client(prompt, GenerationOptions(WARM, chance.randrange(1, 20), logprobs=2), Rng(seed)))
    for client in clients:
        scheduler.submit(client.job)
    for seed, client in enumerate(clients):
        found, job = client.steps(), client.job
        alone = list(generate(Session(toy_program), job.prompt, job.options, Rng(seed), toy_program.tokenizer))
        assert [(s.token, s.text, s.finish_reason) for s in found] == [
            (s.token, s.text, s.finish_reason) for s in alone
        ]
        assert [s.logprob for s in found] == pytest.approx([s.logprob for s in alone], abs=1e-3)
    assert scheduler.counts == {"active": 0, "waiting": 0, "sessions": 3}
    assert sum(client.job.cached for client in clients) > 40


def test_a_step_serves_all_texts(scheduler: Scheduler, gate: Gate) -> None:
    clients = [Client([token], GenerationOptions(max_new_tokens=20)) for token in range(3)]
    for client in clients:
        scheduler.submit(client.job)
    gate.open.set()
    assert [len(client.steps()) for client in clients] == [20, 20, 20]
    assert 20 <= gate.steps <= 22  # the first text may have started alone
    seconds = [client.job.seconds for client in clients]
    assert scheduler.totals.seconds == pytest.approx(sum(seconds))


def test_a_text_starts_while_others_go_on(scheduler: Scheduler) -> None:
    order = list[str]()

    def client(name: str, prompt: list[int], tokens: int) -> Client:
        made = Client(prompt, GenerationOptions(max_new_tokens=tokens))
        put = made.job.deliver

        def deliver(item: Step | Exception) -> None:
            order.append(name)
            put(item)
            if name == "first" and order == ["first"]:
                scheduler.submit(others[0].job)
                scheduler.submit(others[1].job)

        made.job.deliver = deliver
        return made

    others = [client("long prompt", list(range(40)), 2), client("short", [1], 3)]
    first = client("first", [5], 40)
    scheduler.submit(first.job)
    for each in (*others, first):
        each.steps()
    assert order[-1] == "first"
    assert order.index("short") < order.index("long prompt")


def test_a_text_in_another_lane_is_copied(scheduler: Scheduler, gate: Gate) -> None:
    prompt = [(token * 37) % TOY.vocab_size for token in range(30)]
    clients = [Client([*prompt, token], GenerationOptions(max_new_tokens=10)) for token in (1, 2)]
    scheduler.submit(clients[0].job)
    gate.open.set()
    clients[0].items.get(timeout=60)
    scheduler.submit(clients[1].job)
    assert len(clients[1].steps()) == 10
    assert clients[1].job.cached == 30


@pytest.mark.parametrize("length", [1, 2, 30])
def test_prompt_scores_are_those_of_the_eager_model(scheduler: Scheduler, length: int) -> None:
    check_scores(scheduler, length)


def test_a_failure_ends_one_job(scheduler: Scheduler) -> None:
    failing, other = (Client([1, 2], GenerationOptions(WARM, 30), rng) for rng in (Failing(0), Rng(0)))
    wrong = Client([1, 2], GenerationOptions(SamplingOptions(logit_bias={TOY.vocab_size: 1.0})))
    for client in (failing, other, wrong):
        scheduler.submit(client.job)
    with pytest.raises(RuntimeError, match="no luck"):
        failing.steps()
    with pytest.raises(InputError, match="logit-bias"):
        wrong.steps()
    assert len(other.steps()) == 30
    assert scheduler.counts == {"active": 0, "waiting": 0, "sessions": 3}


def test_a_failed_step_ends_all_jobs_but_not_the_scheduler(
    scheduler: Scheduler, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(program, "step", failing)
        clients = [Client([token], GenerationOptions()) for token in range(3)]
        for client in clients:
            scheduler.submit(client.job)
        for client in clients:
            with pytest.raises(MemoryError, match="no memory"):
                client.steps()
    again = Client([1], GenerationOptions(max_new_tokens=2))
    scheduler.submit(again.job)
    assert len(again.steps()) == 2


def test_a_cancelled_job_ends(scheduler: Scheduler, gate: Gate) -> None:
    clients = [Client([token], GenerationOptions()) for token in range(4)]
    for client in clients:
        scheduler.submit(client.job)
    wait_for(scheduler, active=3, waiting=1)
    for client in clients:
        scheduler.cancel(client.job)
    gate.open.set()
    wait_for(scheduler, active=0, waiting=0)
    assert all(client.items.empty() for client in clients)


def test_the_number_of_sessions_is_that_of_the_file(program: Program) -> None:
    assert runner(program, 3).limit == 3
    with pytest.raises(InputError, match=r"--sessions 4 is invalid, because the file was exported for 3 texts at once"):
        runner(program, 4)


def test_a_request_for_several_texts_is_answered_together(program: Program) -> None:
    assert program.tokenizer
    model = Model("toys", 0, program, program.tokenizer, from_file(program.metadata.chat_template))
    with serving(model, sessions=None) as server:
        found = server.post("completions", prompt="Once", n=5, max_tokens=4, temperature=1, seed=3).json()
        alone = server.post("completions", prompt="Once", max_tokens=4, temperature=1, seed=3).json()
        refused = server.post("embeddings", input="Once")
    assert len(found["choices"]) == 5
    assert found["choices"][0]["text"] == alone["choices"][0]["text"]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
