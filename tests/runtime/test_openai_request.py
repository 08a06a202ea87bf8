"""Tests the parameters of requests: the values that are refused, ignored, or have other names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import serve
from tests.support.serving import MESSAGES, Server, serving

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def server(tiny_pte: Path) -> Iterator[Server]:
    with serving(serve.open_model(tiny_pte, "llama2")) as server:
        yield server


@pytest.mark.parametrize(
    ("endpoint", "values", "param", "message"),
    [
        ("completions", {"prompt": "x", "n": 17}, "n", "n 17 is invalid; give 1 to 16"),
        ("completions", {"prompt": "x", "echo": "yes"}, "echo", '"yes" is invalid; give true or false'),
        ("completions", {"prompt": "x", "best_of": 1, "n": 2}, "best_of", "best_of 1 is less than n 2"),
        ("completions", {"prompt": "x", "best_of": 2, "stream": True}, "best_of", "is unsupported with stream"),
        ("completions", {"prompt": "x", "tools": [{}]}, "tools", "tools [{}] is unsupported; give []"),
        ("completions", {"prompt": "x", "mirostat": 3}, "mirostat", "mirostat 3 is invalid; give 0 (none), 1 or 2"),
        ("completions", {"prompt": "x", "grammar": "root"}, "grammar", 'grammar "root" is unsupported; give ""'),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix", 'suffix "y" is unsupported; give ""'),
        (
            "chat/completions",
            {"messages": MESSAGES, "echo": True},
            "echo",
            "echo true is unsupported; give false",
        ),
        ("completions", {"prompt": "x", "temperature": -1}, "temperature", "temperature -1.0 is invalid"),
        ("completions", {"prompt": "x", "temperature": "hot"}, "temperature", '"hot" is invalid; give a number'),
        ("completions", {"prompt": "x", "temperature": 10**400}, "temperature", "is invalid; give a number"),
        ("completions", {"prompt": "x", "top_p": 2}, "top_p", "top-p 2.0 is invalid"),
        ("completions", {"prompt": "x", "top_k": 1.5}, "top_k", "1.5 is invalid; give a whole number"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens 0 is invalid; give 1 or more"),
        ("completions", {"prompt": "x", "logprobs": 21}, "logprobs", "give 0 to 20"),
        (
            "completions",
            {"prompt": "x", "logit_bias": {"a": 1}},
            "logit_bias",
            "is invalid; give at most 1024 token ids",
        ),
        (
            "completions",
            {"prompt": "x", "logit_bias": {"99999": 1}},
            "logit_bias",
            "logit-bias 99999 is invalid; give ids",
        ),
        ("completions", {"prompt": "x", "stop": ["a", ""]}, "stop", "none of them empty"),
        (
            "completions",
            {"prompt": "x", "stop": ["a"] * 17},
            "stop",
            "is invalid; give a text or a list of at most 16 texts",
        ),
        ("completions", {"prompt": "x", "seed": True}, "seed", "true is invalid; give a whole number"),
        ("completions", {"prompt": "x", "stream": "yes"}, "stream", "is invalid; give true or false"),
        ("completions", {"prompt": "x", "stream_options": {}}, "stream_options", "needs stream; add stream: true"),
        ("completions", {"prompt": ["a", 1]}, "prompt", "is invalid; give a text or a list of token ids"),
        ("completions", {"prompt": [[1], [True]]}, "prompt", "is invalid; give a text or a list of token ids"),
        (
            "completions",
            {"prompt": ["a", ""] * 129},
            "prompt",
            "258 times 1 texts; give at most 256",
        ),
        ("completions", {"prompt": [[1], []]}, "prompt", "the prompt is empty"),
        ("completions", {}, "prompt", "is invalid; give a text or a list of token ids"),
        ("completions", {"prompt": []}, "prompt", "the prompt is empty"),
        ("completions", {"prompt": [1, 99999]}, "prompt", "token 99999 is not in the vocabulary"),
        (
            "completions",
            {"prompt": "x", "response_format": {"type": "xml"}},
            "response_format",
            "response_format.type \"xml\" is invalid; give 'text', 'json_object' or",
        ),
        (
            "completions",
            {"prompt": "x", "response_format": {"type": "json_schema"}},
            "response_format",
            "response_format has no json_schema; add",
        ),
        (
            "completions",
            {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
            "response_format",
            "the grammar cannot be used",
        ),
        ("chat/completions", {"messages": []}, "messages", "messages [] is invalid; give a list of at least 1"),
        ("chat/completions", {"messages": ["Hi"]}, "messages", 'messages[0] "Hi" is invalid; give an object'),
        (
            "chat/completions",
            {"messages": [{"role": "user"}]},
            "messages",
            'the message of "user" has no content; add a text',
        ),
        (
            "chat/completions",
            {"messages": [{"role": "tool", "content": ""}]},
            "messages",
            "the roles of the messages are tool",
        ),
        ("chat/completions", {}, "messages", "the request has no messages; add it"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages", 'messages[0] {"content": "x"} has no role'),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "messages[0].content[0].type \"image_url\" is invalid; give 'text'",
        ),
        (
            "chat/completions",
            {"messages": MESSAGES, "max_completion_tokens": 0},
            "max_completion_tokens",
            "give 1 or more",
        ),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 1}, "top_logprobs", "add logprobs: true"),
    ],
)
def test_invalid_values_are_refused(
    server: Server, endpoint: str, values: dict[str, Any], param: str, message: str
) -> None:
    answer = server.post(endpoint, **values)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def test_ignored_parameters_are_listed_in_the_answer_or_at_the_end_of_a_stream(server: Server) -> None:
    ask: dict[str, Any] = {"max_tokens": 2, "store": True, "model": "gpt-4o", "user": None}
    expected = [
        "store is not a parameter of this server and was ignored",
        'model "gpt-4o" is not served; tiny answered',
    ]
    for endpoint, body in (("completions", {"prompt": STORY}), ("chat/completions", {"messages": MESSAGES})):
        answer = server.post(endpoint, **body, **ask).json()
        assert (answer["model"], answer["warnings"]) == ("tiny", expected)
        assert "warnings" not in server.post(endpoint, **body, max_tokens=2, model="tiny").json()
        for how in ({}, {"stream_options": {"include_usage": True}}):
            stream = server.post(endpoint, **body, **ask, stream=True, **how).text
            *chunks, last = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
            assert last["warnings"] == expected
            assert all("warnings" not in chunk for chunk in chunks)
            assert ("usage" in last) == bool(how)


def test_timings_are_those_of_llama_cpps_server(server: Server) -> None:
    answer = server.post("completions", prompt="The bird sang a song of " + STORY, max_tokens=6, n=2).json()
    timings, usage = answer["timings"], answer["usage"]
    assert timings["predicted_n"] == usage["completion_tokens"] == 12
    assert timings["cache_n"] + timings["prompt_n"] == 2 * usage["prompt_tokens"]
    for name in ("prompt", "predicted"):
        count, milliseconds = timings[f"{name}_n"], timings[f"{name}_ms"]
        assert milliseconds > 0
        assert timings[f"{name}_per_token_ms"] == pytest.approx(milliseconds / count)
        assert timings[f"{name}_per_second"] == pytest.approx(1e3 * count / milliseconds)


def test_a_stream_tells_the_timings_of_each_token_if_wanted_as_llama_cpps_server(server: Server) -> None:
    for endpoint, body in (("completions", {"prompt": STORY}), ("chat/completions", {"messages": MESSAGES})):
        stream = server.post(endpoint, **body, max_tokens=4, stream=True, timings_per_token=True).text
        chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        told = [chunk["timings"] for chunk in chunks if "timings" in chunk]
        assert len(told) >= 4
        assert told[-1]["predicted_n"] == 4
        numbers = [timings["predicted_n"] for timings in told]
        assert numbers == sorted(numbers)
        assert len({timings["cache_n"] + timings["prompt_n"] for timings in told}) == 1


def test_a_parameter_may_have_the_name_that_other_servers_give_it(server: Server) -> None:
    def text(**how: Any) -> str:
        answer = server.post("completions", prompt=STORY, seed=1, **how)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    ours = {"repetition_penalty": 1.5, "penalty_window": 9, "typical_p": 0.5, "max_tokens": 30}
    theirs = {"repeat_penalty": 1.5, "repeat_last_n": 9, "typ_p": 0.5, "n_predict": 30}
    assert text(**ours) == text(**theirs) == text(**ours, **theirs)
    assert text(repetition_penalty=1.5, repetition_context_size=9, typical_p=0.5, max_tokens=30) == text(**ours)
    assert text(repeat_penalty=1.9, repeat_last_n=0, n_predict=30) == text(max_tokens=30)
    whole = text(repeat_penalty=1.9, repeat_last_n=-1, n_predict=30)
    assert whole == text(repetition_penalty=1.9, penalty_window=512, max_tokens=30)
    error = server.post("completions", prompt=STORY, repeat_penalty=1.5, repetition_penalty=1.2).json()["error"]
    assert error["param"] == "repeat_penalty"
    assert error["message"] == "repeat_penalty 1.5 and repetition_penalty 1.2 differ; give one"
    error = server.post("completions", prompt=STORY, n_predict="x").json()["error"]
    assert (error["param"], error["message"]) == (
        "n_predict",
        'n_predict "x" is invalid; give 1 or more, or -1 for no limit',
    )


def test_dry_ends_a_repetition_unless_a_breaker_stands_in_it(server: Server) -> None:
    lines = "The cat sat. The cat sat. The cat sat. The cat"
    sat = str(server.model.tokenizer.encode("The cat sat")[-1])

    def text(**how: Any) -> str:
        ask: Any = {"prompt": lines, "temperature": 0, "max_tokens": 1, "logit_bias": {sat: 100}, **how}
        answer = server.post("completions", **ask)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    dry = {"dry_multiplier": 200.0}
    assert text() == " sat"
    assert text(**dry) != " sat"
    assert text(**dry, dry_sequence_breakers=["cat"]) == text(**dry, dry_penalty_last_n=3) == " sat"
    error = server.post("completions", prompt=lines, **dry, dry_sequence_breakers=["q9!"]).json()["error"]
    assert error["param"] == "dry_sequence_breakers"
    assert error["message"] == 'dry_sequence_breakers "q9!" is in no token; give shorter texts'


def test_unknown_parameters_and_nulls_are_ignored(server: Server) -> None:
    harmless = {"user": "me", "store": False, "n": 1, "tools": [{}], "tool_choice": "none", "stop": None, "seed": None}
    assert server.post("completions", prompt="x", max_tokens=1, best_of=1, **harmless).status_code == 200


def test_default_values_change_nothing(server: Server) -> None:
    idle: dict[str, Any] = {"top_k": -1, "stop": "", "logit_bias": {}, "functions": [], "tools": [], "user": ""}
    texts = {"suffix": "", "echo": False, "best_of": 0, "n": 1, "logprobs": None}
    talk = {"n": 1, "logprobs": False, "top_logprobs": 0, "tool_choice": "auto", "parallel_tool_calls": True}
    for endpoint, body, others in (
        ("completions", {"prompt": STORY}, texts),
        ("chat/completions", {"messages": MESSAGES}, talk | {"modalities": ["text"], "response_format": None}),
    ):
        plain = server.post(endpoint, **body, temperature=0, max_tokens=9).json()["choices"]
        for more in (idle, idle | {"stop": []}):
            assert (
                server.post(endpoint, **body, temperature=0, max_tokens=9, **more, **others).json()["choices"] == plain
            )


def test_top_p_0_takes_the_likeliest_and_max_tokens_minus_1_as_many_as_fit(server: Server) -> None:
    def text(**how: Any) -> str:
        answer = server.post("completions", prompt=STORY, **how)
        assert answer.status_code == 200
        return str(answer.json()["choices"][0]["text"])

    assert text(top_p=0, max_tokens=12) == text(temperature=0, max_tokens=12)
    assert len(text(temperature=0, max_tokens=-1, stop=["."])) > len(text(temperature=0, max_tokens=1))
    assert server.post("chat/completions", messages=MESSAGES, max_tokens=-1, stop=["a"]).status_code == 200
