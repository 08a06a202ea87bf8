import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from preproc.chat_template import NAMED
from preproc.jinja_template import JinjaTemplate
from runtime import serve
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.serving.openai_request import read_chat
from runtime.text.generation import GenerationOptions, Step, generate
from runtime.text.prompts import prompt_ids
from runtime.text.sampler import Rng, SamplingOptions
from tests.support.serving import MESSAGES, Server, serving

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def server(tiny_pte: Path) -> Iterator[Server]:
    with serving(serve.open_model(tiny_pte, "llama2")) as server:
        yield server


@pytest.fixture(scope="module")
def expected(tiny_pte: Path) -> Callable[..., list[Step]]:
    """Returns a function that generates a text with a separate program, as the server's belongs to its scheduler."""
    program = Program(tiny_pte)

    def generated(
        prompt: str | list[int], tokens: int, seed: int = 0, logprobs: int | None = None, **how: Any
    ) -> list[Step]:
        ids = prompt_ids(program, prompt) if isinstance(prompt, str) else prompt
        options = GenerationOptions(SamplingOptions(**how), tokens, program.metadata.stop_ids, logprobs=logprobs)
        return list(generate(Session(program), ids, options, Rng(seed), program.tokenizer))

    return generated


def text_of(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 1.1, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.3, "logit_bias": {300: 4.0}},
        {"temperature": 1.2, "typical_p": 0.4},
        {"temperature": 1.0, "mirostat": 1, "mirostat_tau": 2.0, "mirostat_eta": 0.3},
        {"temperature": 1.0, "mirostat": 2, "mirostat_tau": 1.0},
    ],
)
def test_a_completion_equals_generate(server: Server, expected: Callable[..., list[Step]], how: dict[str, Any]) -> None:
    steps = expected(STORY, 30, seed=5, **how)
    body: dict[str, Any] = {"prompt": STORY, "max_tokens": 30, "seed": 5, **how}
    body["logit_bias"] = {str(token): bias for token, bias in how.get("logit_bias", {}).items()}
    body |= {"prompt": prompt_ids(server.model.program, STORY)} if "top_k" in how else {}
    answer = server.post("completions", **body).json()
    assert answer["choices"][0]["text"] == text_of(steps)
    assert answer["choices"][0]["finish_reason"] == steps[-1].finish_reason


@pytest.mark.parametrize("seed", [1, 2])
def test_a_stream_equals_the_whole_answer(server: Server, seed: int) -> None:
    ask = server.client().chat.completions.create
    how: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0.8, "seed": seed, "max_completion_tokens": 40}
    whole = ask(**how)
    chunks = list(ask(**how, stream=True, stream_options={"include_usage": True}))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].usage
    assert whole.usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_messages_are_rendered_by_the_template(server: Server, expected: Callable[..., list[Step]]) -> None:
    talk = [("system", "Tell stories."), ("user", "Of a dog, please.")]
    ids = NAMED["llama2"].encode(talk, server.model.tokenizer)
    parts: Any = [
        {**MESSAGES[0], "role": "developer"},
        {"role": "user", "content": [{"type": "text", "text": talk[1][1]}]},
    ]
    for messages in (MESSAGES, parts):
        answer = server.client().chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=20, seed=1
        )
        assert answer.choices[0].message.content == text_of(expected(ids, 20))
        assert answer.usage
        assert answer.usage.prompt_tokens == len(ids)


def test_a_completion_streams_too_and_without_a_limit_has_16_tokens(server: Server) -> None:
    ask = server.client().completions.create
    whole = ask(model="tiny", prompt=STORY, temperature=0)
    chunks = list(ask(model="tiny", prompt=STORY, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 16, 21)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_equal_seeds_give_equal_texts_and_no_seed_a_new_one(server: Server) -> None:
    def generated(**how: Any) -> str:
        return server.client().completions.create(model="tiny", prompt=STORY, max_tokens=30, **how).choices[0].text

    assert generated(seed=3) == generated(seed=3)
    assert generated(seed=3) != generated(seed=4)
    assert len({generated() for _ in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_ends_before_a_stop_string(server: Server, expected: Callable[..., list[Step]], stream: bool) -> None:
    text = text_of(expected(STORY, 60))
    stop = text[40:47]
    for stops in (stop, [stop, "never said"]):
        answer: Any = server.client().completions.create(
            model="tiny", prompt=STORY, temperature=0, max_tokens=60, stop=stops, stream=stream
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_logprobs_are_those_of_generate(server: Server, expected: Callable[..., list[Step]]) -> None:
    steps = expected(STORY, 12, logprobs=3)
    echoed = (
        server.client()
        .completions.create(model="tiny", prompt=STORY, temperature=0, max_tokens=12, logprobs=3)
        .choices[0]
    )
    assert echoed.logprobs
    assert echoed.logprobs.token_logprobs == pytest.approx([step.logprob for step in steps], abs=1e-4)
    assert echoed.logprobs.tokens
    assert echoed.logprobs.text_offset
    assert all(
        echoed.text.startswith(*pair) for pair in zip(echoed.logprobs.tokens, echoed.logprobs.text_offset, strict=True)
    )
    ids = NAMED["llama2"].encode([("user", "Hi")], server.model.tokenizer)
    steps = expected(ids, 12, logprobs=2)
    ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 12}
    ask |= {"logprobs": True, "top_logprobs": 2}
    whole = server.client().chat.completions.create(**ask).choices[0].logprobs
    chunks = server.client().chat.completions.create(**ask, stream=True)
    streamed = [entry for chunk in chunks if (logs := chunk.choices[0].logprobs) for entry in logs.content or ()]
    assert whole
    assert whole.content
    assert [entry.token for entry in whole.content] == [entry.token for entry in streamed]
    assert [entry.logprob for entry in streamed] == pytest.approx([step.logprob for step in steps], abs=1e-4)
    assert [[likely.logprob for likely in entry.top_logprobs] for entry in streamed] == [
        pytest.approx([value for _, value in step.top_logprobs], abs=1e-4) for step in steps
    ]
    assert b"".join(bytes(entry.bytes or ()) for entry in streamed).decode() == text_of(steps)


@pytest.mark.parametrize("tokens", [0, 3])
def test_an_echo_with_logprobs_has_those_of_the_prompt(
    server: Server, expected: Callable[..., list[Step]], tokens: int
) -> None:
    ids, seen = prompt_ids(server.model.program, STORY), list[float]()
    for end in range(1, len(ids)):
        (step,) = expected(ids[:end], 1, logprobs=server.model.metadata.config.vocab_size)
        seen.append(dict(step.top_logprobs)[ids[end]])
    steps = expected(ids, 3, logprobs=2)[:tokens]
    ask: Any = {"model": "tiny", "temperature": 0, "max_tokens": tokens, "echo": True, "logprobs": 2}
    for prompt in (STORY, ids):
        answer = server.client().completions.create(prompt=prompt, **ask)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (STORY + text_of(steps), "length")
        assert answer.usage
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), tokens)
        logs = choice.logprobs
        assert logs
        assert logs.token_logprobs
        assert logs.token_logprobs[0] is None
        assert logs.token_logprobs[1:] == pytest.approx([*seen, *(step.logprob for step in steps)], abs=1e-4)
        assert logs.top_logprobs
        assert logs.top_logprobs[0] is None
        assert all(max(top.values()) >= own - 1e-6 for top, own in zip(logs.top_logprobs[1:], seen, strict=False))
        assert logs.tokens
        assert logs.tokens[0] == "<s>"
        assert "".join(logs.tokens[1:]) == " " + choice.text
        assert logs.text_offset
        assert all(map(choice.text.startswith, (token.lstrip() for token in logs.tokens[1:2]), logs.text_offset[1:2]))
        assert all(map(choice.text.startswith, logs.tokens[2:], logs.text_offset[2:]))
        chunks = list(server.client().completions.create(prompt=prompt, **ask, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
        echoed = [part for chunk in chunks if (part := chunk.choices[0].logprobs)]
        assert [value for part in echoed for value in part.token_logprobs or ()] == logs.token_logprobs
        assert [value for part in echoed for value in part.text_offset or ()] == logs.text_offset


def test_an_echo_without_logprobs_is_the_prompt_and_what_follows(
    server: Server, expected: Callable[..., list[Step]]
) -> None:
    text = STORY + text_of(expected(STORY, 5))
    assert server.post("completions", prompt=STORY, echo=True, temperature=0, max_tokens=5).json()["choices"][0] == {
        "index": 0,
        "text": text,
        "logprobs": None,
        "finish_reason": "length",
    }
    alone = server.post("completions", prompt=STORY, echo=True, max_tokens=0).json()
    assert (alone["choices"][0]["text"], alone["usage"]["completion_tokens"]) == (STORY, 0)


def test_a_response_format_is_followed(server: Server) -> None:
    schema = {"type": "object", "properties": {"pet": {"enum": ["dog", "cat"]}}, "required": ["pet"]}
    schema["additionalProperties"] = False  # type: ignore[assignment]
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    answer = server.client().chat.completions.create(
        model="tiny", messages=MESSAGES, response_format=form, seed=1, max_tokens=60
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schema)
    assert answer.choices[0].finish_reason == "stop"
    answer = server.client().chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, seed=1, max_tokens=20
    )
    assert (answer.choices[0].message.content or "").startswith("{")


def test_a_continued_chat_reuses_its_cache(server: Server, tiny_pte: Path) -> None:
    ask = server.client().chat.completions.create
    first = ask(model="tiny", messages=MESSAGES, temperature=0, max_tokens=30)
    generated = first.choices[0].message.content
    more: Any = [*MESSAGES, {"role": "assistant", "content": generated}, {"role": "user", "content": "Go on."}]
    second = ask(model="tiny", messages=more, temperature=0, max_tokens=30)
    assert first.usage
    assert second.usage
    assert second.usage.prompt_tokens_details
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    with serving(serve.open_model(tiny_pte, "llama2")) as other:
        fresh = other.client().chat.completions.create(model="tiny", messages=more, temperature=0, max_tokens=30)
    assert fresh.choices == second.choices


@pytest.mark.parametrize(
    "roles",
    ["user user", "assistant user", "system system user", "system", "user assistant", "user system user"],
)
def test_a_jinja_template_takes_the_messages_that_it_renders(roles: str, server: Server) -> None:
    template = JinjaTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{{ '[assistant]' }}")
    model = replace(server.model, template=template)
    messages = [{"role": role, "content": f"Text {number}"} for number, role in enumerate(roles.split())]
    request = read_chat(json.dumps({"messages": messages}).encode(), model)
    text = "".join(f"[{each['role']}]{each['content']}\n" for each in messages) + "[assistant]"
    if messages[-1]["role"] == "assistant":
        text = text.removesuffix("\n[assistant]")
    assert request.prompts == [model.tokenizer.encode(text)]


@pytest.mark.parametrize(("origin", "is_let"), [("http://localhost:3000", True), ("https://elsewhere.example", False)])
def test_only_local_pages_may_send_requests_from_a_browser(origin: str, is_let: bool, server: Server) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
    assert (answer.status_code == 200) == is_let
    assert answer.headers.get("access-control-allow-origin") == (origin if is_let else None)


def test_pages_of_allowed_origins_may_ask_as_well(server: Server) -> None:
    def allowed(origins: list[str], origin: str) -> str | None:
        with serving(server.model, origins=origins) as other:
            answer = httpx.get(f"{other.url}/health", headers={"Origin": origin})
        return answer.headers.get("access-control-allow-origin")

    there = "https://elsewhere.example"
    assert allowed([there], there) == there
    assert allowed([there], "https://third.example") is None
    assert allowed(["*"], there) == "*"
