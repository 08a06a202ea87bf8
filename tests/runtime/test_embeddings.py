from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.checkpoints.layouts import BUILT_IN
from preproc.tokenizer import open_tokenizer
from runtime import serve
from runtime.serving.served_model import Model
from tests.conftest import TOY
from tests.support.kinds import CHUNK, FUSED, PLAIN, EagerSteps, Kind, recomputed
from tests.support.serving import Server, serving

TEXTS = ["Once", "Once upon a time, there was a dog. It was big and red."]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Serves an eager model that returns hidden states, with the built-in tokenizer."""
    steps: Any = EagerSteps(Kind(replace(PLAIN, vocab_size=TOY.vocab_size), FUSED))
    steps.tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    with serving(Model("eager", 0, steps, steps.tokenizer, None)) as server:
        yield server


def expected(server: Server, ids: list[int]) -> list[float]:
    """The vector of a text, from one pass over it."""
    steps: Any = server.model.program
    mean = recomputed(steps.model, ids)[1].numpy().mean(axis=0)
    return list(mean / np.linalg.norm(mean))


def test_openais_client_gets_the_mean_hidden_state_of_each_text(server: Server) -> None:
    ids = [server.model.tokenizer.encode(text) for text in TEXTS]
    assert len(ids[1]) > 2 * CHUNK
    server.post("completions", prompt=TEXTS[1], max_tokens=1)  # whose cache must not be used
    create = server.client().embeddings.create
    for form in ({"encoding_format": "float"}, {}):  # without a form the client asks for base64
        answer = create(model="eager", input=TEXTS, **form)  # type: ignore[arg-type]
        assert [each.index for each in answer.data] == [0, 1]
        for each, tokens in zip(answer.data, ids, strict=True):
            assert each.embedding == pytest.approx(expected(server, tokens), abs=1e-4)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(ids[0]) + len(ids[1])


def test_ids_give_the_vector_of_their_text_and_what_is_ignored_is_said(server: Server) -> None:
    ids = server.model.tokenizer.encode(TEXTS[0])
    told = server.post("embeddings", input=[ids, [5, 6]], user="me", model="other", dimensions=PLAIN.dim).json()
    text = server.post("embeddings", input=TEXTS[0]).json()
    assert told["data"][0]["embedding"] == pytest.approx(text["data"][0]["embedding"], abs=1e-6)
    assert told["data"][1]["embedding"] == pytest.approx(expected(server, [5, 6]), abs=1e-4)
    assert told["warnings"] == [
        "user is not a parameter of this server and was ignored",
        'model "other" is not served; eager answered',
    ]
    assert "warnings" not in text


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({}, "input", "input null is invalid; give a text or a list of token ids"),
        ({"input": []}, "input", "the prompt is empty"),
        ({"input": ["x"] * 257}, "input", "input has 257 texts; give at most 256"),
        ({"input": "word " * 60}, "input", "but the context only 40; shorten it"),
        ({"input": "x", "dimensions": 8}, "dimensions", "dimensions 8 is unsupported; give 32, or leave it out"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format", "give 'float' or 'base64'"),
    ],
)
def test_what_is_impossible_is_refused(server: Server, values: dict[str, Any], param: str, message: str) -> None:
    answer = server.post("embeddings", **values)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_a_file_without_hidden_states_is_said_to_need_them(toy_pte: Path) -> None:
    with serving(serve.open_model(toy_pte)) as server:
        answer = server.post("embeddings", input="x")
    assert answer.status_code == 400
    assert "export it with --hidden-states" in answer.json()["error"]["message"]
