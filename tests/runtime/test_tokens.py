from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime import serve
from runtime.text.prompts import prompt_ids
from tests.support.serving import Server, serving

TEXT = "Once upon a time, ☃ sang."


@pytest.fixture(scope="module")
def server(toy_pte: Path) -> Iterator[Server]:
    with serving(serve.open_model(toy_pte)) as server:
        yield server


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{server.url}/{path}", json=body).json()
    return answer


def test_a_texts_tokens_are_those_of_a_prompt_and_give_the_text_again(server: Server) -> None:
    ids = post(server, "tokenize", content=TEXT, add_special=True)["tokens"]
    assert ids == prompt_ids(server.model.program, TEXT)
    assert post(server, "tokenize", content=TEXT)["tokens"] == ids[1:]
    assert post(server, "detokenize", tokens=ids[1:]) == {"content": TEXT}
    assert post(server, "detokenize", tokens=[]) == {"content": ""}


def test_pieces_are_texts_or_bytes(server: Server) -> None:
    told = post(server, "tokenize", content=TEXT, with_pieces=True)["tokens"]
    pieces = [each["piece"] for each in told]
    assert any(isinstance(piece, list) for piece in pieces)
    assert b"".join(bytes(each) if isinstance(each, list) else each.encode() for each in pieces).decode() == f" {TEXT}"


def test_a_special_tokens_text_is_that_token_unless_it_is_to_be_text(server: Server) -> None:
    (stop,) = post(server, "tokenize", content="</s>")["tokens"]
    assert stop in server.model.metadata.stop_ids
    assert len(post(server, "tokenize", content="</s>", parse_special=False)["tokens"]) > 1
    assert post(server, "detokenize", tokens=[stop]) == {"content": "</s>"}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("tokenize", {}, "content", "the request has no content; add it"),
        ("tokenize", {"content": ["x"]}, "content", 'content ["x"] is invalid; give a text'),
        ("detokenize", {"tokens": ["x"]}, "tokens", 'tokens[0] "x" is invalid; give a whole number'),
        ("detokenize", {"tokens": [99999]}, "tokens", "token 99999 is not in the vocabulary"),
    ],
)
def test_what_is_impossible_is_refused(
    server: Server, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    error = post(server, path, **body)["error"]
    assert error["param"] == param
    assert message in error["message"]
