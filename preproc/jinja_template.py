"""JinjaTemplate: a checkpoint's own chat template, rendered as transformers' apply_chat_template renders it."""

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
"""What stands around a special token's text that came with a message: noncharacters, which no text holds."""

_MARKED = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")

_PROBE = [(USER, "Quixotry"), (ASSISTANT, "Fjordlund"), (USER, "Quixotry")]
"""A conversation of contents that no template holds."""

Said = Message | Mapping[str, Any]
"""A role and a content, or all that OpenAI's API has of a message, such as tool_calls."""


class RefusalError(InputError):
    """A template's own refusal of messages, by raise_exception."""


class _Generation(Extension):
    """transformers' {% generation %}, which only marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class JinjaTemplate:
    """A template in Jinja, run in a sandbox.

    Attributes:
        source: the template.
        bos_token, eos_token: texts that it may ask for.
        clock: what strftime_now formats.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""
    clock: Callable[[], Any] = field(default=datetime.now, compare=False, repr=False)

    def text(self, messages: Sequence[Said], tools: Sequence[Any] | None = None) -> str:
        """The whole text of messages, with what asks for an answer; or up to the end of a last message of the
        assistant, which is then gone on with.

        Args:
            tools: functions that the model may call, each as OpenAI's API describes it.

        Raises:
            RefusalError: the template does not take such messages.
            InputError: it is no Jinja, or fails otherwise.
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
        except InputError:  # as _refuse raises it
            raise
        except Exception as error:  # what a template does is not known, and what its expressions raise neither
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"the chat template cannot be rendered ({reason})") from error

    def encode(self, messages: Sequence[Said], tokenizer: Tokenizer, tools: Sequence[Any] | None = None) -> list[int]:
        """The ids of the whole text, which no BOS is added to: the template says what opens it. The text of a special
        token is only text where it came with a message.

        Raises:
            InputError: as in `text`; or a message holds what the template puts between messages, and the tokenizer
                knows no other way than to take it for a token.
        """
        given, specials = [_described(message) for message in messages], any_of(tokenizer.specials)
        contents = [str(each.get("content", "")) for each in given if each.get("role") != ASSISTANT]
        check_contents(tokenizer, self._between, contents)
        return tokenizer.encode_parts(_parts(self.text(_marked(given, specials), _marked(tools, specials))))

    def stop_ids(self, tokenizer: Tokenizer, bos_id: int | None, others: Sequence[int]) -> tuple[int, ...]:
        """The ids that end a text where messages are answered: those that do anyway, and the one behind an answer."""
        _, _, behind = self._between.partition(_PROBE[1][1])
        return with_end(others, end_id(behind.partition(_PROBE[2][1])[0], tokenizer, bos_id))

    def to_json(self) -> dict[str, str]:
        """As an object of JSON."""
        return {"source": self.source, "bos_token": self.bos_token, "eos_token": self.eos_token}

    @cached_property
    def _between(self) -> str:
        """The text of a plain conversation; empty where the template refuses it."""
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
            message = f"line {error.lineno} of the chat template is no Jinja ({error.message})"
            raise InputError(message) from error
        except (TemplateError, RecursionError) as error:
            raise InputError(f"the chat template is no Jinja ({error})") from error


Carried = JinjaTemplate | ChatTemplate
"""What a file can carry."""


def from_file(text: str) -> Carried | None:
    """The template that a file carries: its Jinja, or the data where it came as such; None where there is none.

    Raises:
        InputError: it is neither.
    """
    if not text:
        return None
    try:
        found = json.loads(text)
        return JinjaTemplate(**found["jinja"]) if found["jinja"] else ChatTemplate.from_json(json.dumps(found["data"]))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the file's chat template cannot be read ({error}); export it again") from error


def to_file(jinja: JinjaTemplate | None, data: ChatTemplate | None) -> dict[str, Any] | None:
    """What a file carries: the template, and what it is as data, where it can be, for runners without Jinja."""
    if jinja is None and data is None:
        return None
    return {"jinja": jinja.to_json() if jinja else None, "data": data.to_json() if data else None}


def _begun(text: str, content: str) -> str:
    """The text up to the end of a content, cut as transformers cuts it for continue_final_message."""
    start = text.rfind(content.strip())
    if start < 0:
        raise InputError("the chat template changes the last message, of the assistant; leave it out")
    whole = content.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else content.strip())]


def _described(message: Said) -> dict[str, Any]:
    """As templates have it. Keys without a value are left out, as in transformers."""
    if isinstance(message, Mapping):
        return {key: value for key, value in message.items() if value is not None}
    return {"role": message[0], "content": message[1]}


def _marked(value: Any, specials: re.Pattern[str]) -> Any:
    """The value with marks around the special tokens in all its texts."""
    if isinstance(value, str):
        return specials.sub(rf"{_OPEN}\g<0>{_CLOSE}", value)
    if isinstance(value, Mapping):
        return {key: _marked(each, specials) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(each, specials) for each in value]
    return value


def _parts(text: str) -> list[Part]:
    """The text without marks, cut at them."""
    parts, done = list[Part](), 0
    for mark in _MARKED.finditer(text):
        parts += [Part(text[done : mark.start()], True), Part(mark[1] or "", False)]
        done = mark.end()
    return [part for part in (*parts, Part(text[done:], True)) if part.text]


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> str:
    raise RefusalError(f"the chat template refuses the messages: {message}")
