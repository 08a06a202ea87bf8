"""Clients that others wrote, against the server. OpenAI's own is what the other tests of the server use."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preproc.jinja_template import JinjaTemplate
from runtime import serve
from tests.support.serving import Server, serving

pytestmark = pytest.mark.slow

TEMPLATE = JinjaTemplate(
    "{% for tool in tools or [] %}{{ tool.function.name }},{% endfor %}<tool_call>"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def server(tiny_pte: Path) -> Iterator[Server]:
    with serving(replace(serve.open_model(tiny_pte), template=TEMPLATE)) as server:
        yield server


def test_langchain_calls_tools_and_reads_json(server: Server) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    @tool
    def either(first: bool, second: bool) -> bool:
        """Says whether one of two is true."""
        return first or second

    class Pet(BaseModel):
        """A pet."""

        is_dog: bool

    for uses_responses in (False, True):
        model = ChatOpenAI(
            base_url=f"{server.url}/v1",
            api_key="unused",  # type: ignore[arg-type]
            model="tiny",
            temperature=0,
            max_tokens=100,  # type: ignore[call-arg]
            use_responses_api=uses_responses,
        )
        asked: list[Any] = [HumanMessage("Is it a dog, or a cat?")]
        answer = model.bind_tools([either], tool_choice="either", strict=True).invoke(asked)
        (call,) = answer.tool_calls
        assert call["name"] == "either"
        assert {type(value) for value in call["args"].values()} == {bool}
        result = ToolMessage(str(either.invoke(call["args"])), tool_call_id=call["id"])
        more = model.bind_tools([either]).invoke([*asked, answer, result])
        assert more.text
        streamed = list(model.stream(asked))
        assert "".join(chunk.text for chunk in streamed) == model.invoke(asked).text
        for method in ("json_schema", "function_calling"):
            pet = model.with_structured_output(Pet, method=method, strict=True).invoke("A pet.")
            assert isinstance(pet, Pet)


def test_llm_answers_whole_and_streamed(server: Server) -> None:
    from llm.default_plugins.openai_models import Chat

    model = Chat("tiny", model_name="tiny", api_base=f"{server.url}/v1", key="unused")
    whole, stream = (
        model.prompt("Tell of a dog.", system="Be brief.", stream=stream, temperature=0, max_tokens=12, key="unused")
        for stream in (False, True)
    )
    assert whole.text() == "".join(stream)
    expected = server.post(
        "chat/completions",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell of a dog."}],
        temperature=0,
        max_tokens=12,
    )
    assert whole.text() == json.loads(expected.text)["choices"][0]["message"]["content"]
