"""JinjaTemplate: a checkpoint's own chat template, rendered like transformers' apply_chat_template."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import InputError
from preproc.chat_template import ASSISTANT, USER, ChatTemplate, Message, check_contents, end_id, with_end
from preproc.special_tokens import Part, any_of
from preproc.tokenizer import Tokenizer

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Marks placed around the text of a special token within a message. They are Unicode noncharacters, which do not occur
in text.
"""

_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")

_PROBE = [(USER, "Quixotry"), (ASSISTANT, "Fjordlund"), (USER, "Quixotry")]
"""Conversation whose contents do not occur in any template."""

Said = Message | Mapping[str, Any]
"""A message: a role and a content, or a mapping with any fields of an OpenAI API message, such as tool_calls."""


class RefusalError(InputError):
    """Raised when a template rejects the messages by calling raise_exception."""


class _Generation(Extension):
    """Support for transformers' {% generation %} tag, which only marks the assistant's text and leaves it unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template in Jinja, rendered in a sandbox.

    Attributes:
        source: the template.
        bos_token, eos_token: values of the template's variables of these names.
        clock: returns the time that strftime_now formats.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""
    clock: Callable[[], Any] = field(default=datetime.now, compare=False, repr=False)

    def text(self, messages: Sequence[Said], tools: Sequence[Any] | None = None) -> str:
        """Renders messages, followed by the generation prompt. If the last message is from the assistant, the text ends
        with that message instead, so that the model continues it.

        Args:
            tools: functions that the model may call, each as described in OpenAI's API.

        Raises:
            RefusalError: the template rejects the messages.
            InputError: the template is not valid Jinja, or rendering fails for another reason.
        """
        given = [_described(message) for message in messages]
        last = given[-1] if given else {}
        begun = str(last.get("content", "")) if last.get("role") == ASSISTANT and "tool_calls" not in last else None
        try:
            text = self._compiled.render(
                messages=given,
                tools=tools,
                documents=None,
                add_generation_prompt=begun is None,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
            return text if begun is None else _begun(text, begun)
        except InputError:  # raised by _refuse
            raise
        except Exception as error:  # templates can raise any exception
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"the chat template cannot be rendered ({reason})") from error

    def encode(self, messages: Sequence[Said], tokenizer: Tokenizer, tools: Sequence[Any] | None = None) -> list[int]:
        """Returns the ids of the rendered text. No BOS is added, because the template itself includes it. The text of a
        special token within a message is encoded as ordinary text.

        Raises:
            InputError: as in `text`; or a message contains a marker that the template puts between messages and that
                the tokenizer cannot encode as ordinary text.
        """
        given, specials = [_described(message) for message in messages], any_of(tokenizer.specials)
        contents = [str(each.get("content", "")) for each in given if each.get("role") != ASSISTANT]
        check_contents(tokenizer, self._between, contents)
        return tokenizer.encode_parts(_parts(self.text(_marked(given, specials), _marked(tools, specials))))

    def stop_ids(self, tokenizer: Tokenizer, bos_id: int | None, others: Sequence[int]) -> tuple[int, ...]:
        """Returns the ids that end an answer: those in `others`, and the token that the template puts after an
        answer.
        """
        _, _, behind = self._between.partition(_PROBE[1][1])
        return with_end(others, end_id(behind.partition(_PROBE[2][1])[0], tokenizer, bos_id))

    def to_json(self) -> dict[str, str]:
        """Returns the template as a JSON object."""
        return {"source": self.source, "bos_token": self.bos_token, "eos_token": self.eos_token}

    @cached_property
    def _between(self) -> str:
        """Text of a plain conversation; empty if the template rejects it."""
        try:
            return self.text(_PROBE)
        except InputError:
            return ""

    @cached_property
    def _compiled(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: self.clock().strftime(form)
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            message = f"line {error.lineno} of the chat template is not valid Jinja ({error.message})"
            raise InputError(message) from error
        except (TemplateError, RecursionError) as error:
            raise InputError(f"the chat template is not valid Jinja ({error})") from error


Carried = JinjaTemplate | ChatTemplate
"""A chat template in one of the forms that a .pte file can carry."""


def from_file(text: str) -> Carried | None:
    """Reads the chat template of a .pte file: Jinja if the file has it, otherwise the data form. None if it has no
    template.

    Raises:
        InputError: the content is neither form.
    """
    if not text:
        return None
    try:
        found = json.loads(text)
        return JinjaTemplate(**found["jinja"]) if found["jinja"] else ChatTemplate.from_json(json.dumps(found["data"]))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the file's chat template cannot be read ({error}); export it again") from error


def to_file(jinja: JinjaTemplate | None, data: ChatTemplate | None) -> dict[str, Any] | None:
    """Returns the JSON object for a .pte file, with the Jinja template and its data form, for runners without Jinja.
    Either may be None; without both, the result is None.
    """
    if jinja is None and data is None:
        return None
    return {"jinja": jinja.to_json() if jinja else None, "data": data.to_json() if data else None}


def _begun(text: str, content: str) -> str:
    """Returns the text up to the end of a content, cut as transformers does for continue_final_message."""
    start = text.rfind(content.strip())
    if start < 0:
        raise InputError("the chat template changes the assistant's message at the end; leave it out")
    whole = content.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else content.strip())]


def _described(message: Said) -> dict[str, Any]:
    """Returns the message as a template receives it. As in transformers, keys with the value None are left out."""
    if isinstance(message, Mapping):
        return {key: value for key, value in message.items() if value is not None}
    return {"role": message[0], "content": message[1]}


def _marked(value: Any, specials: re.Pattern[str]) -> Any:
    """Returns the value with marks around the special tokens in all its strings."""
    if isinstance(value, str):
        return specials.sub(rf"{_OPEN}\g<0>{_CLOSE}", value)
    if isinstance(value, Mapping):
        return {key: _marked(each, specials) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(each, specials) for each in value]
    return value


def _parts(text: str) -> list[Part]:
    """Splits the text at the marks and removes them."""
    parts, done = list[Part](), 0
    for mark in _MARKED.finditer(text):
        parts += [Part(text[done : mark.start()], True), Part(mark[1] or "", False)]
        done = mark.end()
    return [part for part in (*parts, Part(text[done:], True)) if part.text]


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> str:
    raise RefusalError(f"the chat template refuses the messages: {message}")
