"""Tests tools and tool calls in prompts: against transformers' rendering, and for templates without tool support."""

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
    """Parses messages as the server does."""
    body = read_body(json.dumps({"messages": messages}).encode(), ChatBody)
    return [message.described() for message in body.messages]


class Recording(JinjaTemplate):
    """Records the text that is encoded."""

    def encode(self, messages: Any, tokenizer: Any, tools: Any = None) -> list[int]:
        object.__setattr__(self, "rendered", self.text(messages, tools))
        return super().encode(messages, tokenizer, tools)


def text_of(template: Carried, messages: list[dict[str, Any]], tools: list[Any]) -> str:
    """Returns the text that is encoded."""
    if isinstance(template, JinjaTemplate):
        recording = Recording(template.source, template.bos_token, template.eos_token)
        encode(recording, read(messages), tools, ours_of(theirs_of(PUBLIC["smollm2"], byte_level())))
        return str(recording.rendered)  # type: ignore[attr-defined]
    rendered = list[str]()

    class Parts:
        """A tokenizer that records the text instead of encoding it."""

        specials = fixed = dict[str, int]()  # noqa: RUF012

        def encode_parts(self, parts: list[Part]) -> list[int]:
            rendered.append("".join(part.text for part in parts))
            return []

    encode(template, read(messages), tools, Parts())  # type: ignore[arg-type]
    return rendered[0]


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
def test_templates_with_tools_are_rendered_as_by_transformers(name: str, messages: list[dict[str, Any]]) -> None:
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
        (jinja_of(PUBLIC["qwen3"]), ToolSupport(HERMES, True, False, True)),  # the tests' copy renders no calls
        (jinja_of(PUBLIC["smollm2"]), ToolSupport(HERMES, False, False, True)),
        (jinja_of(PUBLIC["llama3.2"]), ToolSupport(HERMES, False, False, True)),  # only mentions that tools exist
        (jinja_of(PUBLIC["gemma"]), ToolSupport(HERMES, False, False, False)),
        (NAMED["llama2"], ToolSupport(HERMES, False, False, True)),
        (NAMED["gemma"], ToolSupport(HERMES, False, False, False)),
    ],
)
def test_a_templates_tool_support_is_detected(template: Carried, expected: ToolSupport) -> None:
    assert tool_support(template) == expected


def test_functions_are_described_in_the_system_message_of_other_templates() -> None:
    smollm2 = jinja_of(PUBLIC["smollm2"])
    system = {"role": "system", "content": "Be brief."}
    asked = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    tools = [WEATHER, CLOCK]
    assert text_of(smollm2, [USER], tools) == f"<|im_start|>system\n{TOLD}<|im_end|>\n{asked}"
    assert text_of(smollm2, [system, USER], tools) == f"<|im_start|>system\nBe brief.\n\n{TOLD}<|im_end|>\n{asked}"
    expected = f"<s>[INST] <<SYS>>\n{TOLD}\n<</SYS>>\n\n{USER['content']} [/INST]"
    assert text_of(NAMED["llama2"], [USER], tools) == expected


def test_functions_are_described_in_the_user_message_without_a_system_message() -> None:
    turn = f"<start_of_turn>user\n{TOLD}\n\n{USER['content']}<end_of_turn>\n<start_of_turn>model\n"
    for template in (NAMED["gemma"], jinja_of(PUBLIC["gemma"])):
        assert text_of(template, [USER], [WEATHER, CLOCK]) == f"<bos>{turn}"
    with pytest.raises(InputError, match="needs a user message for tools"):
        encode(NAMED["gemma"], read([{"role": "assistant", "content": "Hi"}]), [CLOCK], TINY)


def test_calls_and_results_are_plain_text_in_other_templates() -> None:
    results = [RESULT, {**RESULT, "content": "30"}]
    messages = [USER, calling("I ask.", 2), *results, {"role": "assistant", "content": "20."}, USER]
    rendered = text_of(jinja_of(PUBLIC["smollm2"]), messages, [])
    both = "<tool_response>\n20\n</tool_response>\n<tool_response>\n30\n</tool_response>"
    turns = [USER["content"], f"I ask.\n{CALLED}\n{CALLED}", both, "20.", USER["content"]]
    roles = ["user", "assistant"] * 3
    tail = "".join(f"<|im_start|>{role}\n{turn}<|im_end|>\n" for role, turn in zip(roles, turns, strict=False))
    assert rendered.endswith(f"{tail}<|im_start|>assistant\n")
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    rendered = text_of(NAMED["llama2"], [USER, calling(), RESULT], [])
    result = "<tool_response>\n20\n</tool_response>"
    assert rendered == f"<s>[INST] {USER['content']} [/INST] {CALLED} </s><s>[INST] {result} [/INST]"
