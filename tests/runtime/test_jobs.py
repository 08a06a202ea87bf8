"""Tests requests for several texts: several prompts, several choices (n), and the best of several (best_of)."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import serve
from runtime.serving.scheduler import Job, Scheduler
from runtime.serving.served_model import Model
from runtime.text.prompts import prompt_ids
from tests.support.serving import MESSAGES, Gate, Server, serving, told_by_the_end

STORY = "Once upon a time"
OTHER = "The dog"


@pytest.fixture(scope="module")
def server(tiny_pte: Path) -> Iterator[Server]:
    with serving(serve.open_model(tiny_pte, "llama2")) as server:
        yield server


@pytest.fixture
def own_model(tiny_pte: Path) -> Model:
    return serve.open_model(tiny_pte, "llama2")


def texts(server: Server, **how: Any) -> list[str]:
    """Returns the texts of a completion's choices, ordered by index."""
    choices = server.post("completions", **({"prompt": STORY, "max_tokens": 12} | how)).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def test_choices_differ_and_repeat_with_their_seed(server: Server) -> None:
    four = texts(server, n=4, seed=3)
    assert len(set(four)) == 4
    assert texts(server, n=4, seed=3) == four
    assert texts(server, n=2, seed=3) == four[:2]
    assert texts(server, seed=3) == four[:1]
    assert not set(texts(server, n=4, seed=4)) & set(four)
    assert len(set(texts(server, n=3, temperature=0))) == 1


def test_streamed_choices_of_a_chat_equal_whole_ones(server: Server) -> None:
    ask = server.client().chat.completions.create
    how: Any = {"model": "tiny", "messages": MESSAGES, "n": 3, "seed": 5, "max_tokens": 15, "logprobs": True}
    whole = ask(**how)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage
    streamed: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for chunk in ask(**how, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index].append(choice)
        usage = chunk.usage
    assert usage
    assert usage.completion_tokens == whole.usage.completion_tokens > 15
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    for choice in whole.choices:
        found = streamed[choice.index]
        assert found[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in found) == choice.message.content
        assert [each.finish_reason for each in found] == [None] * (len(found) - 1) + [choice.finish_reason]
        entries = [entry for each in found if each.logprobs for entry in each.logprobs.content]
        assert choice.logprobs
        assert [entry.token for entry in entries] == [entry.token for entry in choice.logprobs.content or ()]


def test_choices_are_ordered_by_prompt(server: Server) -> None:
    alone = texts(server, temperature=0), texts(server, prompt=OTHER, temperature=0)
    both = [prompt_ids(server.model.program, prompt) for prompt in (STORY, OTHER)]
    for prompts in ([STORY, OTHER], both, [STORY, both[1]]):
        assert texts(server, prompt=prompts, temperature=0, n=2) == [*alone[0], *alone[0], *alone[1], *alone[1]]
    answer = server.post("completions", prompt=[STORY, OTHER], n=2, max_tokens=3, echo=True, logprobs=0).json()
    lengths = list(map(len, both))
    assert answer["usage"]["prompt_tokens"] == sum(lengths)
    assert answer["usage"]["completion_tokens"] == 4 * 3
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [
        length + 3 for length in lengths for _ in range(2)
    ]
    for choice, prompt in zip(answer["choices"], [STORY, STORY, OTHER, OTHER], strict=True):
        assert choice["text"].startswith(prompt)
    assert len(set(texts(server, prompt=[STORY, STORY]))) == 2


def test_best_of_ranks_by_mean_log_probability(server: Server) -> None:
    how: dict[str, Any] = {"prompt": STORY, "max_tokens": 8, "seed": 6, "temperature": 1.3}
    tried = server.post("completions", **how, n=6, logprobs=0).json()["choices"]
    assert all(choice["finish_reason"] == "length" for choice in tried)
    ranked = sorted(tried, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))
    answer = server.post("completions", **how, n=2, best_of=6).json()
    assert [choice["text"] for choice in answer["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 6 * 8
    assert texts(server, n=2, best_of=2, seed=3) == texts(server, n=2, seed=3)


@pytest.mark.parametrize("sessions", [1, 2, 4])
def test_a_prompt_is_run_once_for_all_its_choices(
    own_model: Model, sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, submit = list[Job](), Scheduler.submit

    def noting(scheduler: Scheduler, job: Job, is_more: bool = False) -> None:
        jobs.append(job)
        submit(scheduler, job, is_more)

    monkeypatch.setattr(Scheduler, "submit", noting)
    with serving(own_model, sessions) as server:
        for words in (OTHER, "A cat", "One day", "Tom and Sue"):  # fills all sessions with texts
            server.post("completions", prompt=words, max_tokens=1)
        jobs.clear()
        answer = server.post("completions", prompt=STORY * 6, n=4, max_tokens=5).json()
    length = answer["usage"]["prompt_tokens"]
    assert length > 20
    assert [job.cached for job in jobs[1:]] == [length - 1] * 3
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == jobs[0].cached < 3


def test_one_request_occupies_at_most_all_sessions(own_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = list[int](), own_model.program.step
    with serving(own_model, sessions=2, max_queue=0) as server:

        def counting(*arguments: Any) -> Any:
            seen.append(server.scheduler.counts["active"] + server.scheduler.counts["waiting"])
            return step(*arguments)

        monkeypatch.setattr(own_model.program, "step", counting)
        assert len(texts(server, prompt=[STORY, OTHER, "A"], n=3, max_tokens=4)) == 9
    assert max(seen) == 2


def test_all_texts_of_a_disconnected_client_end(own_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (False, True):
        with monkeypatch.context() as patch, serving(own_model, sessions=2) as server:
            gate = Gate(own_model.program, patch)
            values = {"prompt": [STORY, OTHER], "n": 3, "max_tokens": 500, "stream": stream}
            body = json.dumps(values).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
                client.sendall(head + body)
                server.wait_for(active=1)
            server.wait_until_left()
            gate.open.set()
            server.wait_for(active=0, waiting=0)
            assert gate.steps <= 2


def test_shutdown_is_reported_once_per_request(own_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    responses = told_by_the_end(own_model, Gate(own_model.program, monkeypatch), {"prompt": [STORY, OTHER], "n": 2})
    assert [text.count("the server is shutting down") for text in responses] == [1, 1]
