"""A server in a thread of the test process, a gate that pauses its model, and a script that it says."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from runtime import serve
from runtime.engine.program import Program
from runtime.serving import running
from runtime.serving.scheduler import Scheduler
from runtime.serving.served_model import Access, Model
from runtime.text.generation import Step

MESSAGES: Any = [{"role": "system", "content": "Tell stories."}, {"role": "user", "content": "Of a dog, please."}]
LIMIT = 20000
"""Maximum size of a request in bytes."""


@dataclass
class Server:
    """A running server."""

    model: Model
    scheduler: Scheduler
    url: str

    def client(self, key: str = "unused") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, endpoint: str, **values: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{endpoint}", json=values, timeout=60)

    def wait_for(self, **counts: int) -> None:
        wait(lambda: counts.items() <= self.scheduler.counts.items(), lambda: f"{self.scheduler.counts}, not {counts}")

    def wait_until_left(self) -> None:
        """Waits until the scheduler has noticed that the clients of all active jobs have left."""
        wait(lambda: all(job.cancelled for job in self.scheduler.active), lambda: "nobody noticed")


def wait(done: Callable[[], bool], failure: Callable[[], str]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, failure()
        time.sleep(0.01)


@contextmanager
def serving(
    model: Model, sessions: int | None = 2, max_queue: int = 100, key: str | None = None, origins: Sequence[str] = ()
) -> Iterator[Server]:
    """Runs a server at a free port."""
    scheduler = Scheduler(model.program, sessions, max_queue)
    server = serve.create_server(model, scheduler, Access(key, LIMIT, origins))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait(lambda: server.started, lambda: "the server does not start")
            yield Server(model, scheduler, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()


class Gate:
    """Blocks a program's steps until `open` is set, and counts them."""

    def __init__(self, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.steps = 0
        step = program.step

        def gated(*arguments: Any) -> Any:
            assert self.open.wait(60)
            self.steps += 1
            return step(*arguments)

        monkeypatch.setattr(program, "step", gated)


class Script:
    """Has the model say given texts in place of its own tokens, one after the other, each word a token.

    Attributes:
        texts: the texts that are still to be said.
        go: the words after the third of a text wait for it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts = list[str]()
        self.go = threading.Event()
        self.go.set()
        monkeypatch.setattr(running, "generate", self._generate)

    def _generate(self, *_: Any) -> Iterator[Step]:
        words = re.findall(r"\S*\s*", self.texts.pop(0))
        for number, word in enumerate(words):
            while number > 2 and not self.go.wait(0.05):
                yield Step(0, "")
            yield Step(0, word, "stop" if number == len(words) - 1 else None)


def told_by_the_end(model: Model, gate: Gate, body: dict[str, Any]) -> list[str]:
    """Returns the responses to two clients, one of them streaming, when the server shuts down while one request is
    active and the other waits.
    """
    responses = list[str]()

    def ask(stream: bool) -> None:
        responses.append(server.post("completions", **body, stream=stream).text)

    with serving(model, sessions=1) as server:
        threads = [threading.Thread(target=ask, args=[stream]) for stream in (False, True)]
        for thread in threads:
            thread.start()
        server.wait_for(active=1, waiting=1)
        threading.Timer(0.3, gate.open.set).start()
    for thread in threads:
        thread.join()
    return responses
