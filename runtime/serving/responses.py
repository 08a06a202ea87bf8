"""The endpoint /v1/responses: OpenAI's Responses, as chats that are not stored."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from pydantic import Field

from preproc.chat_template import ASSISTANT, SYSTEM
from runtime.serving.jobs import Jobs
from runtime.serving.openai_bodies import ChatBody
from runtime.serving.openai_messages import ToolFunction
from runtime.serving.openai_reply import Reply
from runtime.serving.openai_request import CompletionRequest, chat_request
from runtime.serving.request_body import Body, Part, RequestError, read_body, read_values, refuse
from runtime.serving.served_model import Model
from runtime.serving.tool_prompt import TOOL
from runtime.text.generation import Step

_PARAMS = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text"}
"""Parameters of a chat -> those of a response that they come from."""


class InputText(Part):
    """A part of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(Part):
    """A message."""

    type: Literal["message"] = "message"
    role: str
    content: str | list[InputText]


class InputCall(Part):
    """A call in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1)
    arguments: str


class InputResult(Part):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


class ResponseTool(ToolFunction):
    """A function that may be called."""

    type: Literal["function"]


class ChosenTool(Part):
    """The choice of one function."""

    type: Literal["function"]
    name: str


class TextFormat(Part):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    body: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(Part):
    """Options of an answer's text."""

    format: TextFormat = TextFormat()


class ResponsesBody(Body):
    """The parameters of /v1/responses that differ from a chat's; the others of a chat are taken as well."""

    input: str | list[InputMessage | InputCall | InputResult]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions = TextOptions()
    tools: list[ResponseTool] = Field([])
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = Field(
        "auto", description='none, auto, required or {"type": "function", "name": "..."}'
    )

    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "conversation": (),
        "max_tool_calls": (),
        "n": (1,),
        "previous_response_id": (),
        "prompt": (),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }


@dataclass(frozen=True, kw_only=True)
class ResponseRequest(CompletionRequest):
    """A checked request, and its parameters."""

    body: ResponsesBody


def read_response(raw: bytes, model: Model) -> ResponseRequest:
    """Reads the body of POST /v1/responses.

    Raises:
        RequestError: it cannot be answered.
    """
    body = read_body(raw, ResponsesBody)
    chat = dict(body.model_extra or {})
    system = [] if body.instructions is None else [{"role": SYSTEM, "content": body.instructions}]
    chat["messages"] = [*system, *_messages(body.input)]
    if body.max_output_tokens is not None:
        chat["max_completion_tokens"] = body.max_output_tokens
    form = body.text.format
    if form.type == "json_schema" and form.body is None:
        refuse("text", 'text.format has no schema; add "schema": {...}')
    chat["response_format"] = {
        "type": form.type,
        "json_schema": {"schema": form.body} if form.body is not None else None,
    }
    chat["tools"] = [
        {"type": "function", "function": tool.model_dump(exclude_unset=True, exclude={"type"})} for tool in body.tools
    ]
    choice = body.tool_choice
    named = {"type": "function", "function": {"name": getattr(choice, "name", "")}}
    chat["tool_choice"] = choice if isinstance(choice, str) else named
    try:
        request = chat_request(read_values(chat, ChatBody), model)
    except RequestError as error:
        param = error.content["error"]["param"]
        error.content["error"]["param"] = _PARAMS.get(param or "", param)
        raise
    return ResponseRequest(**{each.name: getattr(request, each.name) for each in fields(request)}, body=body)


def _messages(given: str | Sequence[InputMessage | InputCall | InputResult]) -> list[dict[str, Any]]:
    """Returns the input as messages of a chat. Calls belong to the message of the assistant before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages = list[dict[str, Any]]()
    for item in given:
        if isinstance(item, InputMessage):
            messages.append({"role": item.role, "content": _said(item.content)})
        elif isinstance(item, InputResult):
            messages.append({"role": TOOL, "tool_call_id": item.call_id, "content": _said(item.output)})
        else:
            if not messages or messages[-1]["role"] != ASSISTANT:
                messages.append({"role": ASSISTANT, "content": None, "tool_calls": []})
            function = {"name": item.name, "arguments": item.arguments}
            messages[-1].setdefault("tool_calls", []).append(
                {"id": item.call_id, "type": "function", "function": function}
            )
    return messages


def _said(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ResponseReply:
    """The answer to a request, whole or as events."""

    ending = ""

    def __init__(self, request: ResponseRequest, model: Model, jobs: Jobs) -> None:
        """Starts an empty answer; `jobs` as in `Reply`."""
        self._request = request
        self._chat = Reply(request, model, jobs)
        self._id = _new_id("resp")
        self._output = list[dict[str, Any]]()
        self._numbers = 0
        self._reason = "stop"

    def take(self, number: int, step: Step) -> None:
        """Adds the next step."""
        self._chat.take(number, step)

    def whole(self) -> dict[str, Any]:
        """Returns the whole answer as one object."""
        chat = self._chat.whole()
        choice = chat["choices"][0]
        self._reason = choice["finish_reason"]
        if choice["message"]["content"] is not None:
            self._output.append(_message(_new_id("msg"), choice["message"]["content"]))
        self._output += [_call(call) for call in choice["message"].get("tool_calls", ())]
        return self._object(chat)

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yields the first events of a stream."""
        chat = self._chat.head()
        for kind in ("created", "in_progress"):
            yield self._event(kind, response=self._object(chat, "in_progress"))

    def chunks(self, number: int, step: Step) -> Iterator[dict[str, Any]]:
        """Yields the events of a step."""
        for chunk in self._chat.chunks(number, step):
            for choice in chunk["choices"]:
                yield from self._more(choice["delta"].get("content"))
                for call in choice["delta"].get("tool_calls", ()):
                    yield from self._called(_call(call))
                self._reason = choice["finish_reason"] or self._reason

    def closing(self) -> Iterator[dict[str, Any]]:
        """Yields the last events of a stream."""
        yield from self._end_message()
        chat = self._chat.head() | self._chat.tail()
        done = self._object(chat)
        yield self._event("incomplete" if done["status"] == "incomplete" else "completed", response=done)

    def _more(self, text: str | None) -> Iterator[dict[str, Any]]:
        """Yields the events of a text, with which a message may begin."""
        if not text:
            return
        if not self._has_open_message():
            self._output.append({**_message(_new_id("msg"), ""), "status": "in_progress"})
            item = {**self._output[-1], "content": []}
            yield self._event("output_item.added", output_index=len(self._output) - 1, item=item)
            yield self._event("content_part.added", **self._place(), part=_text(""))
        self._output[-1]["content"][0]["text"] += text
        yield self._event("output_text.delta", **self._place(), delta=text, logprobs=[])

    def _called(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the events of a call, which ends a message."""
        yield from self._end_message()
        self._output.append(call)
        index, place = len(self._output) - 1, {"item_id": call["id"], "output_index": len(self._output) - 1}
        begun = {**call, "arguments": "", "status": "in_progress"}
        yield self._event("output_item.added", output_index=index, item=begun)
        yield self._event("function_call_arguments.delta", **place, delta=call["arguments"])
        yield self._event("function_call_arguments.done", **place, name=call["name"], arguments=call["arguments"])
        yield self._event("output_item.done", output_index=index, item=call)

    def _end_message(self) -> Iterator[dict[str, Any]]:
        """Yields the events that end a message, if one has begun."""
        if not self._has_open_message():
            return
        item = self._output[-1]
        item["status"] = "completed"
        part = item["content"][0]
        yield self._event("output_text.done", **self._place(), text=part["text"], logprobs=[])
        yield self._event("content_part.done", **self._place(), part=part)
        yield self._event("output_item.done", output_index=len(self._output) - 1, item=item)

    def _has_open_message(self) -> bool:
        return bool(self._output) and self._output[-1]["status"] == "in_progress"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        self._numbers += 1
        return {"type": f"response.{kind}", "sequence_number": self._numbers - 1, **values}

    def _object(self, chat: Mapping[str, Any], status: str | None = None) -> dict[str, Any]:
        """Returns the response object; `chat` is the answer to the chat."""
        body, cut = self._request.body, self._reason == "length" and status is None
        sampling = self._request.options.sampling
        told = body.model_dump(mode="json", by_alias=True, include={"instructions", "max_output_tokens"})
        told |= body.model_dump(
            mode="json", by_alias=True, include={"text", "tools", "tool_choice"}, exclude_unset=True
        )
        return {
            "id": self._id,
            "object": "response",
            "created_at": chat["created"],
            "status": status or ("incomplete" if cut else "completed"),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": chat["model"],
            "output": [] if status else self._output,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "parallel_tool_calls": (body.model_extra or {}).get("parallel_tool_calls", True),
            "previous_response_id": None,
            "store": False,
            "metadata": {},
            "tools": [],
            "tool_choice": "auto",
            "text": {"format": {"type": "text"}},
            **told,
            "usage": _usage(chat["usage"]) if "usage" in chat else None,
            **{key: chat[key] for key in ("timings", "warnings") if key in chat},
        }


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(id: str, text: str) -> dict[str, Any]:
    return {"id": id, "type": "message", "status": "completed", "role": ASSISTANT, "content": [_text(text)]}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a call in an answer to a chat as an item of the output."""
    return {
        "id": _new_id("fc"),
        "type": "function_call",
        "status": "completed",
        "call_id": call["id"],
        **call["function"],
    }


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
