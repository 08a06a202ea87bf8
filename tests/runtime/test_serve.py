import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from model.errors import InputError
from runtime import serve
from runtime.serving.served_model import Model
from tests.support.serving import LIMIT, MESSAGES, Gate, Server, serving, told_by_the_end, wait

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tiny_pte: Path) -> Model:
    return serve.open_model(tiny_pte, "llama2")


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Server]:
    with serving(model) as server:
        yield server


@pytest.fixture
def own_model(tiny_pte: Path) -> Model:
    return serve.open_model(tiny_pte, "llama2")


def test_the_model_is_listed(server: Server) -> None:
    client = server.client()
    (only,) = client.models.list().data
    assert only.id == "tiny"
    assert client.models.retrieve("tiny") == only
    assert only.model_extra
    assert only.model_extra["max_model_len"] == 512  # as vLLM names it
    assert only.model_extra["sampling"] == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"[1]", 400, "the body [1] is invalid; send an object"),
        (b'{"prompt": "\\ud800"}', 400, "surrogates not allowed"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "NaN is not a number"),
        (b"[" * 15000, 400, "the body is not JSON"),
        (b"\xff\xfe\xfd", 400, "the body is not JSON"),
        (b" " * (LIMIT + 1), 413, f"more than {LIMIT} bytes"),
        (json.dumps({"prompt": "word " * 600}).encode(), 400, "the context only 512; shorten it"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(server: Server, body: bytes, status: int, message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    assert message in answer.json()["error"]["message"]


def test_other_paths_and_methods_are_refused_with_a_list(server: Server) -> None:
    for answer, status in ((httpx.get(f"{server.url}/v2"), 404), (httpx.get(f"{server.url}/v1/completions"), 405)):
        assert answer.status_code == status
        assert "is not an endpoint; see /v1/models" in answer.json()["error"]["message"]


def test_without_a_template_messages_are_refused_with_the_flag_that_gives_one(toy_pte: Path) -> None:
    with serving(serve.open_model(toy_pte)) as server, pytest.raises(openai.BadRequestError, match="--chat-template"):
        server.client().chat.completions.create(model="toy", messages=MESSAGES)


def test_only_the_right_key_opens_the_endpoints(model: Model) -> None:
    with serving(model, key="secret") as server:
        assert server.client("secret").models.list().data[0].id == "tiny"
        for key in ("Secret", "secre", "secret s"):
            answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), key
        for path in ("v1/models", "metrics"):
            assert httpx.get(f"{server.url}/{path}").status_code == 401
        assert httpx.post(f"{server.url}/tokenize", json={"content": "x"}).status_code == 401
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_requests_beyond_the_queues_limit_are_refused_with_retry_after(
    own_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, answers = Gate(own_model.program, monkeypatch), list[httpx.Response]()

    def ask() -> None:
        answers.append(server.post("completions", prompt="Once", max_tokens=2))

    with serving(own_model, sessions=1, max_queue=1) as server:
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        server.wait_for(active=1, waiting=1)
        refused = server.post("completions", prompt="Once")
        gate.open.set()
        for thread in threads:
            thread.join()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        assert [answer.status_code for answer in answers] == [200, 200]
        assert server.post("completions", prompt="Once").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_frees_its_place(own_model: Model, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    gate = Gate(own_model.program, monkeypatch)
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 500, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with serving(own_model, sessions=1) as server:
        port = int(server.url.rpartition(":")[2])
        active, waiting = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        active.sendall(head + body)
        server.wait_for(active=1)
        waiting.sendall(head + body)
        server.wait_for(active=1, waiting=1)
        waiting.close()
        server.wait_for(active=1, waiting=0)
        active.close()
        server.wait_until_left()
        gate.open.set()
        server.wait_for(active=0)
        assert gate.steps == 1


def test_a_stream_may_be_cancelled(own_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(own_model.program, monkeypatch)
    gate.open.set()
    with serving(own_model, sessions=1) as server:
        with server.client().completions.create(model="tiny", prompt="Once", max_tokens=500, stream=True) as stream:
            said = [next(stream).choices[0].text for _ in range(3)]
            gate.open.clear()
        assert all(said)
        server.wait_until_left()
        steps = gate.steps
        gate.open.set()
        server.wait_for(active=0, waiting=0)
        assert gate.steps <= steps + 1


def test_waiting_clients_are_informed_of_the_shutdown(own_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    responses = told_by_the_end(own_model, Gate(own_model.program, monkeypatch), {"prompt": "Once"})
    assert [text.count("the server is shutting down") for text in responses] == [1, 1]


def test_a_failure_is_an_error_for_one_client(own_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(own_model) as server:
        with monkeypatch.context() as broken:
            broken.setattr(own_model.program, "step", lambda *arguments: 1 / 0)
            whole = server.post("completions", prompt="Once")
            stream = server.post("completions", prompt="Once", stream=True)
        assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
        assert json.loads(stream.text.removeprefix("data: "))["error"]["type"] == "server_error"
        assert server.post("completions", prompt="Once").status_code == 200


@contextmanager
def process(file: Path, *flags: str, end: signal.Signals = signal.SIGTERM) -> Iterator[tuple[str, int]]:
    """Runs the command and yields its URL and process id. The signal `end` must end it with code 0 and no further
    output.
    """
    call = [sys.executable, "-m", "runtime.serve", str(file), "--port", "0", *flags]
    with subprocess.Popen(call, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        started = re.fullmatch(r"serving \w+ at (http://\S+); Ctrl-C ends\n", server.stderr.readline())
        try:
            assert started
            yield started[1], server.pid
        finally:
            server.send_signal(end)
            rest = server.stderr.read()
    assert (server.returncode, rest) == (0, "")


async def send_random_request(client: httpx.AsyncClient, chance: random.Random) -> None:
    """Sends a random request, which may be cancelled after a random time."""
    body: dict[str, Any] = {
        "prompt": "Once upon a time " * chance.randrange(1, 9),
        "max_tokens": chance.randrange(1, 40),
    }
    if stream := chance.random() < 0.7:
        body["stream"] = True
    cancel_after = chance.choice([None, None, 0.02, 0.1, 0.5])

    async def ask() -> None:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            lines = [line async for line in answer.aiter_lines()]
            assert lines[-2:] == ["data: [DONE]", ""] if stream else len(lines) == 1

    try:
        await asyncio.wait_for(ask(), cancel_after)
    except asyncio.TimeoutError:
        assert cancel_after


def resident(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def test_200_requests_with_cancellations_leak_nothing(tiny_pte: Path) -> None:
    chance = random.Random(3)

    async def send_requests(url: str, count: int) -> None:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
            await asyncio.gather(*(send_random_request(client, chance) for _ in range(count)))

    def counts(url: str) -> dict[str, Any]:
        return dict(httpx.get(f"{url}/health").json())

    with process(tiny_pte, "--sessions", "3", "--max-queue", "200") as (url, pid):
        asyncio.run(send_requests(url, 20))
        wait(lambda: counts(url)["active"] == 0, lambda: f"{counts(url)}")
        before = resident(pid)
        asyncio.run(send_requests(url, 200))
        wait(lambda: counts(url)["active"] == 0, lambda: f"{counts(url)}")
        assert counts(url) == {"status": "ok", "active": 0, "waiting": 0, "sessions": 3}
        assert resident(pid) < before + 16e6


def test_ctrl_c_ends_the_command_while_it_answers(tiny_pte: Path) -> None:
    with (
        process(tiny_pte, end=signal.SIGINT) as (url, _),
        httpx.Client(timeout=60) as client,
        client.stream(
            "POST", f"{url}/v1/completions", json={"prompt": "Once", "max_tokens": 500, "stream": True}
        ) as answer,
    ):
        assert next(answer.iter_lines()).startswith("data: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sessions", "0"], "--sessions 0 is invalid"),
        (["--port", "99999"], "--port 99999 is not available"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid --port 8000 is not available"),
        (["--api-key", ""], "--api-key '' is invalid"),
        (["--chat-template", "llama3"], "which the tokenizer lacks"),
        (["--chat-template", "mine"], "--chat-template mine is unknown; choose from"),
        (["--threads", "0"], "--threads 0 is invalid"),
    ],
)
def test_the_command_refuses_impossible_flags(toy_pte: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        serve.main([str(toy_pte), *flags])


def test_numbers_must_not_be_negative(toy_pte: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        serve.main([str(toy_pte), "--max-queue", "-1"])
    assert caught.value.code == 2
    assert "'-1' is invalid; give a whole number, 0 or more" in capsys.readouterr().err


def test_missing_libraries_are_reported_with_the_install_command(
    toy_pte: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs pydantic, starlette, uvicorn.*pip install 'llama-pte\[serve\]'"):
        serve.main([str(toy_pte)])
