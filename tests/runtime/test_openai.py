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


def test_what_is_ignored_is_said_in_the_answer_or_at_the_end_of_a_stream(server: Server) -> None:
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
    told = server.post("completions", prompt="The bird sang a song of " + STORY, max_tokens=6, n=2).json()
    timings, usage = told["timings"], told["usage"]
    assert timings["predicted_n"] == usage["completion_tokens"] == 12
    assert timings["cache_n"] + timings["prompt_n"] == 2 * usage["prompt_tokens"]
    for name in ("prompt", "predicted"):
        count, milliseconds = timings[f"{name}_n"], timings[f"{name}_ms"]
        assert milliseconds > 0
        assert timings[f"{name}_per_token_ms"] == pytest.approx(milliseconds / count)
        assert timings[f"{name}_per_second"] == pytest.approx(1e3 * count / milliseconds)


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
