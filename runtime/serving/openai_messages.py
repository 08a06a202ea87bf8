"""Reads and checks messages and tools (functions that a model may call) in OpenAI's form."""

import json
from dataclasses import dataclass
from typing import Any

from preproc.chat_template import ASSISTANT, SYSTEM
from runtime.serving.request_values import Values, refuse, shown
from runtime.serving.tool_prompt import TOOL, Described

_FORM = '{"type": "function", "function": {"name": "..."}}'


@dataclass(frozen=True)
class Tools:
    """The functions that a model may call.

    Attributes:
        given: the functions, as OpenAI's API describes them; may be empty.
        required: the functions of which one must be called; None if the model may choose to call none.
        several: whether an answer may have more than one call.
    """

    given: tuple[Described, ...] = ()
    required: tuple[Described, ...] | None = None
    several: bool = True

    @property
    def names(self) -> list[str]:
        """The names of the functions."""
        return [str(tool["function"]["name"]) for tool in self.given]


def read_tools(values: Values) -> Tools:
    """Reads the tools of a request and its tool choice.

    Raises:
        RequestError: they are malformed.
    """
    choice, several = values.get("tool_choice", "auto"), values.flag("parallel_tool_calls", True)
    if choice == "none":
        return Tools()
    given = values.get("tools", [])
    if not isinstance(given, list):
        refuse("tools", f"tools {shown(given)} is invalid; give a list of functions")
    tools = Tools(tuple(_tool(each) for each in given), several=several)
    if repeated := next((name for name in tools.names if tools.names.count(name) > 1), None):
        refuse("tools", f"tools has {shown(repeated)} more than once; give each function a different name")
    if choice == "auto":
        return tools
    if choice == "required":
        if not given:
            refuse("tool_choice", 'tool_choice "required" needs tools; give some, or leave it out')
        return Tools(tools.given, tools.given, several)
    name = _name(choice)
    if name is None:
        refuse("tool_choice", f"tool_choice {shown(choice)} is unknown; give none, auto, required or {_FORM}")
    if name not in tools.names:
        known = ", ".join(map(shown, tools.names)) or "it in tools as well"
        refuse("tool_choice", f"tool_choice names {shown(name)}, which is not in tools; give {known}")
    return Tools(tools.given, (tools.given[tools.names.index(name)],), False)


def read_messages(values: Values) -> list[Described]:
    """Reads the messages of a request.

    Raises:
        RequestError: they are malformed.
    """
    given = values.get("messages")
    if not isinstance(given, list) or not given:
        refuse("messages", f"messages {shown(given)} is invalid; give a list of at least one message")
    return [_message(each) for each in given]


def _name(value: Any) -> str | None:
    """Returns the name of the function in an object {"type": "function", ...}, or None if it is no such object."""
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(value.get("function"), dict):
        return None
    name = value["function"].get("name")
    return name if isinstance(name, str) and name else None


def _tool(value: Any) -> Described:
    """Checks one tool and returns it."""
    name = _name(value)
    if name is None:
        refuse("tools", f"tools has {shown(value)}, which is not a function; give {_FORM}")
    parameters, text = (value["function"].get(key) for key in ("parameters", "description"))
    if parameters is not None and not isinstance(parameters, dict):
        refuse("tools", f"the parameters {shown(parameters)} of {shown(name)} are invalid; give a JSON schema")
    if text is not None and not isinstance(text, str):
        refuse("tools", f"the description {shown(text)} of {shown(name)} is invalid; give a text")
    return value


def _message(value: Any) -> Described:
    """Reads one message. Its content may be a list of texts, and may be missing if there are calls."""
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(role, str):
        refuse("messages", f"the message {shown(value)} has no role; give system, user or assistant")
    content, calls = value.get("content"), value.get("tool_calls") if role == ASSISTANT else None
    message: dict[str, Any] = {"role": SYSTEM if role == "developer" else role}
    if content is not None or not calls:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(_is_text(part) for part in parts):
            refuse("messages", f"the content {shown(content)} is invalid; give only text")
        message["content"] = "".join(part["text"] for part in parts)
    if calls:
        if not isinstance(calls, list):
            refuse("messages", f"tool_calls {shown(calls)} is invalid; give a list of calls")
        message["tool_calls"] = [_call(call) for call in calls]
    if role == TOOL:
        message |= {key: value[key] for key in ("tool_call_id", "name") if isinstance(value.get(key), str)}
    return message


def _call(value: Any) -> dict[str, Any]:
    """Reads a call in an earlier message, and returns it with its arguments as an object, the form for templates."""
    name = _name({"type": "function"} | value) if isinstance(value, dict) else None
    if name is None:
        refuse("messages", f"tool_calls has {shown(value)}, which is not a call; give {_FORM}")
    arguments = value["function"].get("arguments") or {}
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
        json.dumps(found, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        refuse("messages", f"the arguments {shown(arguments)} of {shown(name)} are invalid; give an object as JSON")
    id = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    return {**id, "type": "function", "function": {"name": name, "arguments": found}}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
