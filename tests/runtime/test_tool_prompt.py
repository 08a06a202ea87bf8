"""Functions and calls in what a model is given, against transformers' rendering, and where a template knows of none."""

import json
from typing import Any

import pytest

from model.errors import InputError
from preproc.chat_template import NAMED
from preproc.jinja_template import Carried, JinjaTemplate
from preproc.special_tokens import Part
from runtime.serving.openai_bodies import ChatBody
from runtime.serving.request_body import read_body
from runtime.serving.tool_calls import HERMES, LLAMA3, MISTRAL
from runtime.serving.tool_prompt import DESCRIPTION, ToolSupport, encode, tool_support
from tests.export.test_jinja_reduction import TINY, jinja_of, ours_of, theirs_of
from tests.preproc.test_tokenizer import byte_level
from tests.support.chat_templates import PUBLIC
from tests.support.tool_templates import WITH_TOOLS

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How warm it is, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": "How warm is it in Köln?"}
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "20"}
TOLD = DESCRIPTION.format(f"{json.dumps(WEATHER, ensure_ascii=False)}\n{json.dumps(CLOCK)}")
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def calling(content: str | None = None, calls: int = 1) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [CALL] * calls}


def read(messages: list[dict[str, Any]]) -> list[Any]:
    """Messages as a client sends them."""
    body = read_body(json.dumps({"messages": messages}).encode(), ChatBody)
    return [message.described() for message in body.messages]


class Noting(JinjaTemplate):
    """Keeps the text that its ids are of."""

    def encode(self, messages: Any, tokenizer: Any, tools: Any = None) -> list[int]:
        object.__setattr__(self, "said", self.text(messages, tools))
        return super().encode(messages, tokenizer, tools)


def text_of(template: Carried, messages: list[dict[str, Any]], tools: list[Any]) -> str:
    """The text that becomes ids."""
    if isinstance(template, JinjaTemplate):
        noting = Noting(template.source, template.bos_token, template.eos_token)
        encode(noting, read(messages), tools, ours_of(theirs_of(PUBLIC["smollm2"], byte_level())))
        return str(noting.said)  # type: ignore[attr-defined]
    said = list[str]()

    class Parts:
        """A tokenizer that keeps what it is given."""

        specials = fixed = dict[str, int]()  # noqa: RUF012

        def encode_parts(self, parts: list[Part]) -> list[int]:
            said.append("".join(part.text for part in parts))
            return []

    encode(template, read(messages), tools, Parts())  # type: ignore[arg-type]
    return said[0]


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": "Be brief."}, USER],
        [USER, calling(), RESULT],
        [USER, calling(), RESULT, {"role": "assistant", "content": "20 °C."}, {"role": "user", "content": "And now?"}],
    ],
)
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_what_a_template_tells_itself_is_told_as_transformers_tells_it(
    name: str, messages: list[dict[str, Any]]
) -> None:
    if name.startswith("mistral") and messages[0]["role"] == "system":
        messages = messages[1:]
    theirs = theirs_of(WITH_TOOLS[name], byte_level())
    as_objects = [json.loads(json.dumps(message)) for message in messages]
    for message in as_objects:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    for tools in ([WEATHER, CLOCK], []):
        expected = theirs.apply_chat_template(
            as_objects, tools=tools or None, add_generation_prompt=True, return_dict=False
        )
        assert encode(jinja_of(WITH_TOOLS[name]), read(messages), tools, ours_of(theirs)) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (jinja_of(WITH_TOOLS["qwen2.5"]), ToolSupport(HERMES, True, True, True)),
        (jinja_of(WITH_TOOLS["llama3.1"]), ToolSupport(LLAMA3, True, True, True)),
        (jinja_of(WITH_TOOLS["mistral v0.3"]), ToolSupport(MISTRAL, True, True, False)),
        (jinja_of(PUBLIC["qwen3"]), ToolSupport(HERMES, True, False, True)),  # as it stands in the tests, without calls
        (jinja_of(PUBLIC["smollm2"]), ToolSupport(HERMES, False, False, True)),
        (jinja_of(PUBLIC["llama3.2"]), ToolSupport(HERMES, False, False, True)),  # which only says that there are some
        (jinja_of(PUBLIC["gemma"]), ToolSupport(HERMES, False, False, False)),
        (NAMED["llama2"], ToolSupport(HERMES, False, False, True)),
        (NAMED["gemma"], ToolSupport(HERMES, False, False, False)),
    ],
)
def test_what_a_template_can_tell_is_found_out(template: Carried, expected: ToolSupport) -> None:
    assert tool_support(template) == expected


def test_functions_are_told_of_in_the_system_message_where_the_template_does_not() -> None:
    smollm2 = jinja_of(PUBLIC["smollm2"])
    system = {"role": "system", "content": "Be brief."}
    asked = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    tools = [WEATHER, CLOCK]
    assert text_of(smollm2, [USER], tools) == f"<|im_start|>system\n{TOLD}<|im_end|>\n{asked}"
    assert text_of(smollm2, [system, USER], tools) == f"<|im_start|>system\nBe brief.\n\n{TOLD}<|im_end|>\n{asked}"
    expected = f"<s>[INST] <<SYS>>\n{TOLD}\n<</SYS>>\n\n{USER['content']} [/INST]"
    assert text_of(NAMED["llama2"], [USER], tools) == expected


def test_functions_are_told_of_with_what_the_user_says_where_there_is_no_system_message() -> None:
    turn = f"<start_of_turn>user\n{TOLD}\n\n{USER['content']}<end_of_turn>\n<start_of_turn>model\n"
    for template in (NAMED["gemma"], jinja_of(PUBLIC["gemma"])):
        assert text_of(template, [USER], [WEATHER, CLOCK]) == f"<bos>{turn}"
    with pytest.raises(InputError, match="needs a user message for tools"):
        encode(NAMED["gemma"], read([{"role": "assistant", "content": "Hi"}]), [CLOCK], TINY)


def test_calls_and_what_came_of_them_are_texts_where_the_template_does_not_tell_them() -> None:
    results = [RESULT, {**RESULT, "content": "30"}]
    messages = [USER, calling("I ask.", 2), *results, {"role": "assistant", "content": "20."}, USER]
    said = text_of(jinja_of(PUBLIC["smollm2"]), messages, [])
    both = "<tool_response>\n20\n</tool_response>\n<tool_response>\n30\n</tool_response>"
    turns = [USER["content"], f"I ask.\n{CALLED}\n{CALLED}", both, "20.", USER["content"]]
    roles = ["user", "assistant"] * 3
    tail = "".join(f"<|im_start|>{role}\n{turn}<|im_end|>\n" for role, turn in zip(roles, turns, strict=False))
    assert said.endswith(f"{tail}<|im_start|>assistant\n")
    assert said.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    said = text_of(NAMED["llama2"], [USER, calling(), RESULT], [])
    result = "<tool_response>\n20\n</tool_response>"
    assert said == f"<s>[INST] {USER['content']} [/INST] {CALLED} </s><s>[INST] {result} [/INST]"
