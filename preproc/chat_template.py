"""Messages to token ids, by a chat template that is only data, so that any language can apply it.

`export.planning.jinja_reduction` makes one from the Jinja template that a checkpoint brings
(`preproc.jinja_template`); NAMED has some by name.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from model.errors import InputError, listed
from preproc.special_tokens import Part, any_of
from preproc.tokenizer import Tokenizer

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

Message = tuple[str, str]
"""A role and a content."""

DATE_OPENS, DATE_CLOSES = "\ue000", "\ue001"
"""What stands around a format of strftime in a template's texts, in whose place the time of the conversation comes."""

_DATE = re.compile(f"{DATE_OPENS}([^{DATE_CLOSES}]*){DATE_CLOSES}")


@dataclass(frozen=True)
class SystemPlace:
    """How a system message is given.

    Attributes:
        before: what stands before it: in place of the text's opening, or behind what opens the last turn where it is
            given there.
        behind: what stands between it and the user's content.
        is_late: whether it is given in the last turn, in place of the first.
        strips: whether white space around it falls away.
        joins: whether it and the user's content are one, and white space falls away only behind them.
        skips_empty: whether an empty one counts as none.
    """

    before: str
    behind: str
    is_late: bool = False
    strips: bool = False
    joins: bool = False
    skips_empty: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """What stands between the contents of messages.

    Attributes:
        opening: what stands before the first user's content where no system message is given.
        answer: what stands between a user's content and the answer to it.
        again: what stands between an answer and the user's next content.
        ask: what stands behind the last user's content, and asks for an answer.
        strips_user, strips_assistant: whether white space around such contents falls away.
        system: how a system message is given; None refuses one.
        thought_end: what ends a thought, such as </think>: of an answer that is given again, only what stands behind
            the last one is. Empty where answers are given again as they were.
        thought_strips: the characters that fall away right behind it.

    Texts may hold the date, see DATE_OPENS.
    """

    opening: str
    answer: str
    again: str
    ask: str
    strips_user: bool = False
    strips_assistant: bool = False
    system: SystemPlace | None = None
    thought_end: str = ""
    thought_strips: str = ""

    def parts(self, messages: Sequence[Message], now: datetime | None = None) -> list[Part]:
        """The whole text. Special tokens are only in what comes from the template.

        Args:
            now: the time of the conversation; None takes the clock's.

        Raises:
            InputError: the messages do not take turns, or there is a system message where none can be given.
        """
        found, clock = self._parts(messages), now or datetime.now()
        return [
            part._replace(text=_DATE.sub(lambda match: clock.strftime(match[1]), part.text))
            if part.parse_special
            else part
            for part in found
        ]

    def _parts(self, messages: Sequence[Message]) -> list[Part]:
        """The whole text, the date still as its format."""
        system, contents = self._checked(messages)
        parts = list[Part]()
        for i, content in enumerate(contents):
            if i % 2:
                parts += [Part(self.answer, True), _content(self._answered(content), self.strips_assistant)]
                continue
            opening = Part(self.again if i else self.opening, True)
            late = self.system is not None and self.system.is_late
            if self.system and system is not None and i == (len(contents) - 1 if late else 0):
                parts += self._with_system(self.system, opening, system, content)
            else:
                parts += [opening, _content(content, self.strips_user)]
        return [*parts, Part(self.ask, True)]

    def text(self, messages: Sequence[Message], now: datetime | None = None) -> str:
        """The whole text, as the template's Jinja would make it; see `parts`."""
        return "".join(part.text for part in self.parts(messages, now))

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids of the whole text, which no BOS is added to: the template says what opens it.

        Raises:
            InputError: as in `parts`; or a content holds what the template uses, and the tokenizer knows no other way
                than to take it for a token.
        """
        parts = self.parts(messages)
        own = "".join(part.text for part in parts if part.parse_special)
        check_contents(tokenizer, own, [part.text for part in parts if not part.parse_special])
        return tokenizer.encode_parts(parts)

    def end_id(self, tokenizer: Tokenizer, bos_id: int | None) -> int | None:
        """The id that ends an answer: the first token behind it that is no ordinary text."""
        return end_id(self.again, tokenizer, bos_id)

    def stop_ids(self, tokenizer: Tokenizer, bos_id: int | None, others: Sequence[int]) -> tuple[int, ...]:
        """The ids that end a text where messages are answered: those that do anyway, and `end_id`."""
        return with_end(others, self.end_id(tokenizer, bos_id))

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON."""
        return asdict(self)

    @staticmethod
    def from_json(text: str) -> "ChatTemplate":
        """Reads what a file carries.

        Raises:
            InputError: it is no template.
        """
        try:
            fields = json.loads(text)
            system = fields.pop("system")
            return ChatTemplate(**fields, system=SystemPlace(**system) if system else None)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(f"the file's chat template cannot be read ({error}); export it again") from error

    def _checked(self, messages: Sequence[Message]) -> tuple[str | None, list[str]]:
        """The system message, where there is one, and the other contents."""
        roles = [role for role, _ in messages]
        has_system = roles[:1] == [SYSTEM]
        turns = roles[has_system:]
        if len(turns) % 2 == 0 or turns != [ASSISTANT if i % 2 else USER for i in range(len(turns))]:
            raise InputError(
                f"the messages are of {', '.join(roles) or 'nobody'}; give user and assistant in turns, the user first "
                "and last, and before them at most one of system"
            )
        if has_system and self.system is None:
            raise InputError("the chat template takes no system message; leave it out")
        system = messages[0][1] if has_system else None
        if self.system and self.system.skips_empty and system == "":
            system = None
        return system, [content for _, content in messages[has_system:]]

    def _answered(self, content: str) -> str:
        """What an answer is when it is given again: all behind its last thought."""
        if not self.thought_end or self.thought_end not in content:
            return content
        return content.rpartition(self.thought_end)[2].lstrip(self.thought_strips)

    def _with_system(self, place: SystemPlace, opening: Part, system: str, content: str) -> list[Part]:
        before = [*([opening] if place.is_late else ()), Part(place.before, True)]
        both = [_content(system, place.strips), Part(place.behind, True), _content(content, self.strips_user)]
        if place.joins:
            both[2] = Part(content, False)
            for i in (2, 1, 0):
                both[i] = both[i]._replace(text=both[i].text.rstrip())
                if both[i].text:
                    break
        return [*before, *both]


def _content(text: str, strips: bool) -> Part:
    return Part(text.strip() if strips else text, False)


def end_id(behind: str, tokenizer: Tokenizer, bos_id: int | None) -> int | None:
    """The id that ends an answer: the first token in what stands behind it that is no ordinary text."""
    texts = {**tokenizer.specials, **_markers(tokenizer.fixed)}
    found = any_of(texts).search(behind)
    token = texts[found[0]] if found else None
    return None if token == bos_id else token


def with_end(others: Sequence[int], end_id: int | None) -> tuple[int, ...]:
    """Ids that end a text, and one more where it is none of them."""
    return (*others, *(() if end_id is None or end_id in others else (end_id,)))


def check_contents(tokenizer: Tokenizer, own: str, contents: Sequence[str]) -> None:
    """
    Args:
        own: what a template has between contents.

    Raises:
        InputError: a content holds some of it that the tokenizer knows no other way than to take for a token.
    """
    for text in _markers(tokenizer.fixed):
        if text in own and any(text in content for content in contents):
            raise InputError(f"a message holds {text}, which stands between messages; leave it out")


def _markers(texts: Mapping[str, int]) -> dict[str, int]:
    """Those that are no mere spaces, line ends or punctuation."""
    return {text: i for text, i in texts.items() if re.search("[0-9A-Za-z]", text)}


def _of_turns(bos: str, before: str, behind: str, assistant: str = ASSISTANT, **options: Any) -> ChatTemplate:
    """A template whose messages look alike, but for the role's name, which `before` has a {} for."""
    system = SystemPlace(bos + before.format(SYSTEM), behind + before.format(USER), strips=options["strips_user"])
    return ChatTemplate(
        opening=bos + before.format(USER),
        answer=behind + before.format(assistant),
        again=behind + before.format(USER),
        ask=behind + before.format(assistant),
        **({"system": system} | options),
    )


_TRIMMED: dict[str, Any] = {"strips_user": True, "strips_assistant": True}

NAMED: dict[str, ChatTemplate] = {
    "llama2": ChatTemplate(
        opening="<s>[INST] ",
        answer=" [/INST] ",
        again=" </s><s>[INST] ",
        ask=" [/INST]",
        **_TRIMMED,
        system=SystemPlace("<s>[INST] <<SYS>>\n", "\n<</SYS>>\n\n", joins=True),
    ),
    "llama3": _of_turns("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", **_TRIMMED),
    "chatml": _of_turns("", "<|im_start|>{}\n", "<|im_end|>\n", strips_user=False),
    "mistral": ChatTemplate(
        opening="<s>[INST] ",
        answer=" [/INST] ",
        again="</s>[INST] ",
        ask=" [/INST]",
        system=SystemPlace("<s>[INST] ", "\n\n"),
    ),
    "gemma": _of_turns("<bos>", "<start_of_turn>{}\n", "<end_of_turn>\n", "model", **_TRIMMED, system=None),
}
"""The templates of Llama 2 and 3, of ChatML, of Mistral's first Instruct models, and of Gemma."""

_CONTROLS = {
    "llama2": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
}
"""The tokens that each of them needs."""


def named(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """One of the templates NAMED.

    Raises:
        InputError: there is none of that name, or the tokenizer lacks one of its tokens.
    """
    if name not in NAMED:
        raise InputError(f"--chat-template {name} is unknown; choose from {', '.join(NAMED)}")
    if missing := [text for text in _CONTROLS[name] if text not in tokenizer.specials and text not in tokenizer.fixed]:
        raise InputError(f"--chat-template {name} needs {listed(missing)}, which the tokenizer lacks; give another")
    return NAMED[name]
