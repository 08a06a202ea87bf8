"""Tests tool calls through the server: required calls, calls in answers, and calls in the history."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from preproc.jinja_template import JinjaTemplate
from runtime import serve
from runtime.serving import openai_request, running
from runtime.serving.openai_request import read_chat
from runtime.serving.served_model import Model
from runtime.text.generation import GenerationOptions, Step, StepBuilder
from tests.support.serving import MESSAGES, Server, serving

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
PET: Any = {"type": "function", "function": {"name": "pet", "description": "Gets some.", "parameters": SCHEMA}}
WAIT: Any = {"type": "function", "function": {"name": "wait"}}
NAMED: Any = {"type": "function", "function": {"name": "pet"}}
CALL = '<tool_call>\n{"name": "pet", "arguments": {"kind": "dog", "count": 1}}\n</tool_call>'


def brief(marker: str) -> JinjaTemplate:
    """Returns a template with a model's marker of tool calls, and little other text."""
    listing = "{% for tool in tools or [] %}{{ tool.function.name }},{% endfor %}"
    turns = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}\n"
    return JinjaTemplate(f"{listing}{marker}{turns}{{% endfor %}}")


@pytest.fixture(scope="module")
def model(tiny_pte: Path) -> Model:
    return serve.open_model(tiny_pte, "llama2")


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Server]:
    with serving(replace(model, template=brief("<tool_call>"))) as server:
        yield server


@pytest.fixture
def saying(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Returns a function that makes the model generate a given text for every prompt."""

    def prescribe(text: str) -> None:
        def generate(
            session: Any, prompt: Sequence[int], options: GenerationOptions, rng: Any, tokenizer: Any, *others: Any
        ) -> Iterator[Step]:
            builder = StepBuilder(prompt, replace(options, stop_strings=()), tokenizer)
            for token in [*tokenizer.encode(text)[1:], options.stop_ids[0]]:
                yield replace(builder.build(token, False), logprob=-1.0)

        monkeypatch.setattr(running, "generate", generate)

    return prescribe


def chat(server: Server, **how: Any) -> tuple[Any, list[Any]]:
    """Returns a choice of a whole answer, and the chunks of the same answer as a stream."""
    ask = server.client().chat.completions.create
    how = {"model": "tiny", "messages": MESSAGES, "seed": 1, **how}
    whole = ask(**how)
    return whole.choices[0], [choice for chunk in ask(**how, stream=True) for choice in chunk.choices]


def called(calls: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in calls or ()]


def check_alike(whole: Any, stream: list[Any]) -> None:
    """Checks that a stream and the whole answer have the same content."""
    assert "".join(each.delta.content or "" for each in stream) == (whole.message.content or "")
    deltas = [call for each in stream for call in each.delta.tool_calls or ()]
    assert called(deltas) == called(whole.message.tool_calls)
    assert [call.index for call in deltas] == list(range(len(deltas)))
    assert [each.finish_reason for each in stream] == [None] * (len(stream) - 1) + [whole.finish_reason]


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_required_call_has_valid_arguments(server: Server, choice: Any) -> None:
    for seed in range(4):
        whole, stream = chat(server, tools=[WAIT, PET], tool_choice=choice, seed=seed, parallel_tool_calls=False)
        check_alike(whole, stream)
        assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
        (call,) = whole.message.tool_calls
        assert call.type == "function"
        assert call.id.startswith("call_")
        assert call.function.name in (["pet"] if choice == NAMED else ["pet", "wait"])
        schema = SCHEMA if call.function.name == "pet" else {"maxProperties": 0}
        jsonschema.validate(json.loads(call.function.arguments), schema)


@pytest.mark.parametrize("marker", ["<|python_tag|>", "[TOOL_CALLS]", "<|tool_call|>"])
def test_calls_are_read_in_the_templates_form(model: Model, marker: str) -> None:
    with serving(replace(model, template=brief(marker))) as server:
        whole, stream = chat(server, tools=[PET], tool_choice="required", parallel_tool_calls=False)
    check_alike(whole, stream)
    jsonschema.validate(json.loads(whole.message.tool_calls[0].function.arguments), SCHEMA)
    assert (len(whole.message.tool_calls[0].id) == 9) == (marker == "[TOOL_CALLS]")


@pytest.mark.parametrize(
    ("text", "content", "calls", "reason"),
    [
        ("A dog is here.", "A dog is here.", [], "stop"),
        (CALL, None, [("pet", '{"kind": "dog", "count": 1}')], "tool_calls"),
        (f"I ask. {CALL}\n{CALL}", "I ask.", [("pet", '{"kind": "dog", "count": 1}')] * 2, "tool_calls"),
        ("<tool_call>\nnone\n</tool_call>", "<tool_call>\nnone\n</tool_call>", [], "stop"),
        ("So <tool", "So <tool", [], "stop"),
    ],
)
def test_generated_text_is_split_into_content_and_calls(
    server: Server,
    saying: Callable[[str], None],
    text: str,
    content: str | None,
    calls: list[tuple[str, str]],
    reason: str,
) -> None:
    saying(f"\n{text}")
    whole, stream = chat(server, tools=[PET], logprobs=True)
    check_alike(whole, stream)
    assert (whole.message.content or "").strip() == (content or "")
    assert (called(whole.message.tool_calls), whole.finish_reason) == (calls, reason)
    assert (whole.message.content is None) == (content is None)
    entries = [entry.token for each in stream if each.logprobs for entry in each.logprobs.content]
    assert entries == [entry.token for entry in whole.logprobs.content]


def test_without_tools_a_call_stays_text(server: Server, saying: Callable[[str], None]) -> None:
    saying(f"\n{CALL}")
    for how in ({}, {"tools": [PET], "tool_choice": "none"}):
        whole, stream = chat(server, **how)
        check_alike(whole, stream)
        assert CALL in whole.message.content
        assert (whole.message.tool_calls, whole.finish_reason) == (None, "stop")


def test_a_chat_continues_after_a_call(server: Server) -> None:
    first, _ = chat(server, tools=[PET], tool_choice=NAMED)
    call = first.message.tool_calls[0]
    more = [*MESSAGES, first.message, {"role": "tool", "tool_call_id": call.id, "content": "Rex"}]
    for how in ({"tools": [PET]}, {}):
        whole, stream = chat(server, messages=more, max_tokens=8, **how)
        check_alike(whole, stream)
        assert whole.message.content


def test_an_answer_with_a_response_format_may_be_a_call(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    seen = set()
    for seed in range(12):
        whole, stream = chat(server, tools=[PET], response_format=form, seed=seed, temperature=3)
        check_alike(whole, stream)
        seen.add(whole.finish_reason)
        if whole.finish_reason == "stop":
            assert whole.message.content in ("true", "false")
        else:
            jsonschema.validate(json.loads(whole.message.tool_calls[0].function.arguments), SCHEMA)
    assert seen == {"stop", "tool_calls"}


def test_the_prompt_has_the_functions_unless_tool_choice_is_none(model: Model) -> None:
    def length(**values: Any) -> int:
        return len(read_chat(json.dumps({"messages": MESSAGES, **values}).encode(), model).prompts[0])

    plain = length()
    assert length(tools=[PET]) > plain + 50
    assert length(tools=[PET], tool_choice="none") == length(tools=[], tool_choice="auto") == plain


HISTORY = {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({"tools": {}}, "tools", "tools {} is invalid; give a list"),
        ({"tools": [{}]}, "tools", "tools[0] {} has no type; add it"),
        (
            {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
            "tools",
            "tools[0].type \"custom\" is invalid; give 'function'",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": ""}}]},
            "tools",
            'tools[0].function.name "" is invalid; give at least',
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools",
            "parameters [] is invalid; give an object",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": 1}}]},
            "tools",
            "description 1 is invalid; give a text",
        ),
        ({"tools": [PET, PET]}, "tools", 'tools has "pet" more than once; give each function a different name'),
        ({"tools": [PET], "tool_choice": "any"}, "tool_choice", 'tool_choice "any" is invalid; give none, auto, req'),
        ({"tools": [PET], "tool_choice": {"type": "function"}}, "tool_choice", "is invalid; give none, auto"),
        (
            {"tools": [WAIT], "tool_choice": NAMED},
            "tool_choice",
            'names "pet", which is not in tools; give "wait"',
        ),
        ({"tool_choice": NAMED}, "tool_choice", 'names "pet", which is not in tools; give it in tools as well'),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [PET], "parallel_tool_calls": 1}, "parallel_tool_calls", "is invalid; give true or false"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "no"}}}],
                "tool_choice": "required",
            },
            "tools",
            "the grammar cannot be used",
        ),
        (
            {"messages": [{**HISTORY, "tool_calls": {"x": 1}}]},
            "messages",
            'messages[0].tool_calls {"x": 1} is invalid; give a list',
        ),
        (
            {"messages": [{**HISTORY, "tool_calls": [{}]}]},
            "messages",
            "messages[0].tool_calls[0] {} has no function; add it",
        ),
        (
            {"messages": [{**HISTORY, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
            "messages",
            'the arguments "[1]" of "f" are invalid; give an object as JSON',
        ),
        (
            {"messages": [{**HISTORY, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}]},
            "messages",
            "give an object as JSON",
        ),
        ({"messages": [HISTORY]}, "messages", 'the message of "assistant" has no content; add a text'),
    ],
)
def test_malformed_requests_are_refused(server: Server, values: dict[str, Any], param: str, message: str) -> None:
    answer = server.post("chat/completions", **({"messages": MESSAGES} | values))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_without_llguidance_only_required_calls_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_request, "find_spec", lambda name: None)
    assert server.post("chat/completions", messages=MESSAGES, tools=[PET], max_tokens=1).status_code == 200
    error = server.post("chat/completions", messages=MESSAGES, tools=[PET], tool_choice="required").json()["error"]
    assert error["param"] == "tool_choice"
    assert error["message"] == "the server lacks llguidance; run there: pip install 'llama-pte[constrain]'"
