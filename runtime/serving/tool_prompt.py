"""Encodes messages with the functions that a model may call and with earlier calls.

A checkpoint's own template renders them if it can. Otherwise they are added to the messages as texts in Hermes' form.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.errors import InputError
from preproc.chat_template import ASSISTANT, SYSTEM, USER, ChatTemplate
from preproc.jinja_template import Carried
from preproc.tokenizer import Tokenizer
from runtime.serving.tool_calls import HERMES, Form, form_of

TOOL = "tool"
"""The role of messages with the result of a call."""

DESCRIPTION = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""The description of functions with which Hermes 2 Pro and Qwen were trained."""

_NAME, _CALLED, _KEY, _RESULT = "Zumpango", "Vexillary", "Quixotry", "Fjordlund"
"""Words that no template contains, to find out what a template renders."""

_TOOLS = [{"type": "function", "function": {"name": _NAME, "description": _KEY, "parameters": {"type": "object"}}}]

_CALL = {"id": "Zumpango9", "type": "function", "function": {"name": _CALLED, "arguments": {_KEY: _KEY}}}

Described = Mapping[str, Any]
"""A message or function as in OpenAI's API; a message's content is one text, and arguments of calls are objects."""


@dataclass(frozen=True)
class ToolSupport:
    """The messages and functions that a template renders, and the form of its model's calls.

    Attributes:
        form: the form in which its model writes calls.
        tells_tools: whether the template renders functions.
        tells_calls: whether the template renders earlier calls and their results.
        has_system: whether the template renders a system message.
    """

    form: Form
    tells_tools: bool
    tells_calls: bool
    has_system: bool


@functools.lru_cache(maxsize=4)
def tool_support(template: Carried) -> ToolSupport:
    """Determines what a template renders, by rendering examples."""
    has_system = _tells(template, [{"role": SYSTEM, "content": _NAME}, {"role": USER, "content": _KEY}], None, _NAME)
    if isinstance(template, ChatTemplate):
        return ToolSupport(HERMES, False, False, has_system)
    asked: list[Described] = [{"role": USER, "content": _KEY}]
    tells_tools = _tells(template, asked, _TOOLS, _NAME)
    result = {"role": TOOL, "tool_call_id": _CALL["id"], "name": _CALLED, "content": _RESULT}
    answered = [*asked, {"role": ASSISTANT, "tool_calls": [_CALL]}, result]
    tells_calls = _tells(template, answered, _TOOLS if tells_tools else None, _CALLED, _RESULT)
    return ToolSupport(form_of(template.source) if tells_tools else HERMES, tells_tools, tells_calls, has_system)


def encode(
    template: Carried, messages: Sequence[Described], tools: Sequence[Described], tokenizer: Tokenizer
) -> Sequence[int]:
    """Returns the ids of messages and of the functions that may be called.

    Raises:
        InputError: the template refuses the messages.
    """
    support, given = tool_support(template), list(messages)
    if any("tool_calls" in message for message in given) and not support.tells_calls:
        given = _as_texts(given, support.form)
    if tools and not support.tells_tools:
        given = _with_description(given, tools, support.has_system)
    if isinstance(template, ChatTemplate):
        return template.encode([(message["role"], message["content"]) for message in given], tokenizer)
    return template.encode(given, tokenizer, list(tools) if tools and support.tells_tools else None)


def _tells(template: Carried, messages: Sequence[Described], tools: Sequence[Described] | None, *texts: str) -> bool:
    """Returns whether the text that a template renders contains all of some texts; False if it refuses the messages."""
    try:
        if isinstance(template, ChatTemplate):
            text = template.text([(message["role"], message["content"]) for message in messages])
        else:
            text = template.text(messages, tools)
    except InputError:
        return False
    return all(each in text for each in texts)


def _as_texts(messages: Sequence[Described], form: Form) -> list[Described]:
    """Returns the messages with calls and their results turned into texts of assistant and user."""
    texts, was_result = list[dict[str, Any]](), False
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if calls := message.get("tool_calls"):
            written = form.render([(call["function"]["name"], call["function"]["arguments"]) for call in calls])
            content = f"{content}\n{written}" if content else written
        if role == TOOL:
            content = f"<tool_response>\n{content}\n</tool_response>"
            if was_result:
                texts[-1]["content"] += f"\n{content}"
                continue
        texts.append({"role": USER if role == TOOL else role, "content": content})
        was_result = role == TOOL
    return [*texts]


def _with_description(messages: Sequence[Described], tools: Sequence[Described], has_system: bool) -> list[Described]:
    """Returns the messages with a description of the functions in the system message or the first user message.

    Raises:
        InputError: the template takes no system message, and there is no user message.
    """
    text = DESCRIPTION.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    given = list(messages)
    if has_system and given[0]["role"] == SYSTEM:
        return [{**given[0], "content": f"{given[0]['content']}\n\n{text}"}, *given[1:]]
    if has_system:
        return [{"role": SYSTEM, "content": text}, *given]
    first = next((i for i, message in enumerate(given) if message["role"] == USER), None)
    if first is None:
        raise InputError("the chat template needs a user message for tools; add one")
    given[first] = {**given[first], "content": f"{text}\n\n{given[first]['content']}"}
    return given
