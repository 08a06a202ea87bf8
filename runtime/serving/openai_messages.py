"""Messages and tools (functions that a model may call) in OpenAI's form."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field

from preproc.chat_template import ASSISTANT, SYSTEM
from runtime.serving.request_body import Part, refuse, shown
from runtime.serving.tool_prompt import TOOL, Described


class _Described(Part):
    """An object that templates get with all its entries."""

    model_config = ConfigDict(extra="allow")


class ToolFunction(_Described):
    """A function that may be called."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Described):
    """A tool, which must be a function."""

    type: Literal["function"]
    function: ToolFunction


class FunctionName(Part):
    """The name of a function."""

    name: str = Field(min_length=1)


class ToolName(Part):
    """The choice of one function."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(FunctionName):
    """A function and the arguments that it was called with, an object or its JSON."""

    arguments: str | dict[str, Any] | None = None


class ToolCall(Part):
    """A call in an earlier message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Part):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Part):
    """A message. Its content may be missing if it has calls."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def described(self) -> Described:
        """Returns the message in the form for templates.

        Raises:
            RequestError: it has neither content nor calls, or the arguments of a call are no object.
        """
        message: dict[str, Any] = {"role": SYSTEM if self.role == "developer" else self.role}
        calls = self.tool_calls if self.role == ASSISTANT else None
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        elif self.content is not None:
            message["content"] = self.content
        elif not calls:
            refuse("messages", f"the message of {shown(self.role)} has no content; add a text")
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        if self.role == TOOL:
            message |= self.model_dump(include={"tool_call_id", "name"}, exclude_none=True)
        return message


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


def read_tools(given: Sequence[Tool], choice: str | ToolName, several: bool) -> Tools:
    """Returns the tools of a request, of which a choice says whether one must be called.

    Raises:
        RequestError: two have the same name, or the choice is none of them.
    """
    tools = Tools(tuple(tool.model_dump(exclude_unset=True) for tool in given), several=several)
    if repeated := next((name for name in tools.names if tools.names.count(name) > 1), None):
        refuse("tools", f"tools has {shown(repeated)} more than once; give each function a different name")
    if choice == "required":
        if not given:
            refuse("tool_choice", 'tool_choice "required" needs tools; give some, or leave it out')
        return Tools(tools.given, tools.given, several)
    if isinstance(choice, str):
        return tools
    name = choice.function.name
    if name not in tools.names:
        known = ", ".join(map(shown, tools.names)) or "it in tools as well"
        refuse("tool_choice", f"tool_choice names {shown(name)}, which is not in tools; give {known}")
    return Tools(tools.given, (tools.given[tools.names.index(name)],), False)


def _call(call: ToolCall) -> dict[str, Any]:
    """Returns a call with its arguments as an object."""
    name, arguments = call.function.name, call.function.arguments or {}
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
        json.dumps(found, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        refuse("messages", f"the arguments {shown(arguments)} of {shown(name)} are invalid; give an object as JSON")
    id = {"id": call.id} if call.id is not None else {}
    return {**id, "type": "function", "function": {"name": name, "arguments": found}}
