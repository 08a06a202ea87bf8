"""OpenAI's Responses, which are chats in another form."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from preproc.jinja_template import JinjaTemplate
from runtime import serve
from runtime.serving.openai_request import read_chat
from runtime.serving.responses import read_response
from runtime.serving.served_model import Model
from tests.support.serving import MESSAGES, Server, serving

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
PET: Any = {"type": "function", "name": "pet", "parameters": SCHEMA, "strict": True}
TEMPLATE = JinjaTemplate(
    "{% for tool in tools or [] %}{{ tool | tojson }},{% endfor %}<tool_call>"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}\n"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tiny_pte: Path) -> Model:
    return replace(serve.open_model(tiny_pte), template=TEMPLATE)


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Server]:
    with serving(model) as server:
        yield server


def test_an_answer_is_that_of_the_same_chat(server: Server) -> None:
    how: Any = {"temperature": 0.7, "top_p": 0.9}
    chat = server.post("chat/completions", messages=MESSAGES, max_tokens=2, seed=3, top_k=40, **how).json()
    instructions, user = (message["content"] for message in MESSAGES)
    answer = server.client().responses.create(
        model="tiny",
        instructions=instructions,
        input=user,
        max_output_tokens=2,
        extra_body={"seed": 3, "top_k": 40},
        **how,
    )
    assert answer.output_text == chat["choices"][0]["message"]["content"]
    assert answer.usage
    assert answer.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (2, chat["usage"]["total_tokens"])
    assert answer.incomplete_details
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.temperature, answer.top_p, answer.instructions) == (0.7, 0.9, instructions)


@pytest.mark.parametrize(
    "how",
    [
        {"input": "A dog.", "max_output_tokens": 20},
        {"input": "A dog.", "max_output_tokens": 60, "tools": [PET], "tool_choice": "required"},
        {"input": "A dog.", "tools": [PET], "tool_choice": {"type": "function", "name": "pet"}},
        {"input": "A dog.", "text": {"format": {"type": "json_schema", "name": "pet", "schema": SCHEMA}}},
    ],
)
def test_a_stream_tells_what_the_whole_answer_says(server: Server, how: dict[str, Any]) -> None:
    def told(output: Any) -> list[Any]:
        return [
            (item.name, item.arguments) if item.type == "function_call" else item.content[0].text for item in output
        ]

    how |= {"model": "tiny", "extra_body": {"seed": 4}, "parallel_tool_calls": False}
    whole = server.client().responses.create(**how)
    events = list(server.client().responses.create(**how, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert told(last.response.output) == told(whole.output)
    texts = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert texts == whole.output_text
    with server.client().responses.stream(**how) as stream:  # which checks the order of the events
        assert told(stream.get_final_response().output) == told(whole.output)
    if "tools" in how:
        assert [item.type for item in whole.output] == ["function_call"]
        jsonschema.validate(json.loads(whole.output[0].arguments), SCHEMA)
    elif "text" in how:
        jsonschema.validate(json.loads(whole.output_text), SCHEMA)
        assert whole.text.format.type == "json_schema"


def test_input_items_become_the_messages_of_a_chat(model: Model) -> None:
    arguments = '{"kind": "dog"}'
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "A "}, {"type": "input_text", "text": "dog."}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Wait.", "annotations": []}],
        },
        {"type": "function_call", "call_id": "a", "name": "pet", "arguments": arguments, "id": "fc_1"},
        {"type": "function_call", "call_id": "b", "name": "pet", "arguments": arguments},
        {"type": "function_call_output", "call_id": "a", "output": "Rex"},
        {"type": "function_call_output", "call_id": "b", "output": "Max"},
    ]
    calls = [{"id": id, "type": "function", "function": {"name": "pet", "arguments": arguments}} for id in "ab"]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A dog."},
        {"role": "assistant", "content": "Wait.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "Rex"},
        {"role": "tool", "tool_call_id": "b", "content": "Max"},
    ]
    tool = {"type": "function", "function": {"name": "pet", "parameters": SCHEMA, "strict": True}}
    given = {"instructions": "Be brief.", "input": items, "tools": [PET]}
    response = read_response(json.dumps(given).encode(), model)
    chat = read_chat(json.dumps({"messages": messages, "tools": [tool]}).encode(), model)
    assert response.prompts == chat.prompts
    bare = read_response(json.dumps({"input": items[2:3]}).encode(), model)
    alone = [{"role": "assistant", "content": None, "tool_calls": calls[:1]}]
    assert bare.prompts == read_chat(json.dumps({"messages": alone}).encode(), model).prompts


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        ({}, "input", "the request has no input; add it"),
        ({"input": []}, "input", "give a list of at least 1"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "input[0]"),
        ({"input": "word " * 600}, "input", "the context only 512; shorten it"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id", "is unsupported; leave it out"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "0 is invalid; give 1 or more"),
        ({"input": "x", "tool_choice": "any"}, "tool_choice", "give none, auto, required or"),
        ({"input": "x", "temperature": -1}, "temperature", "temperature -1.0 is invalid"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text", "has no"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools", "tools[0]"),
    ],
)
def test_what_is_impossible_is_refused(server: Server, values: dict[str, Any], param: str, message: str) -> None:
    answer = server.post("responses", **values)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def test_what_is_ignored_is_said(server: Server) -> None:
    answer = server.post("responses", input="x", max_output_tokens=1, store=True, model="gpt-4o").json()
    assert len(answer["warnings"]) == 2
    assert answer["store"] is False
