"""ChatTemplate: a chat template represented as data, which a runner in any language can apply without Jinja.

`export.planning.jinja_reduction` derives one from a checkpoint's Jinja template (`preproc.jinja_template`). NAMED holds
predefined ones.
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
"""Marks around a strftime format in a template's texts. The format is replaced by the time of the conversation."""

_DATE = re.compile(f"{DATE_OPENS}([^{DATE_CLOSES}]*){DATE_CLOSES}")


@dataclass(frozen=True)
class SystemPlace:
    """Placement of a system message.

    Attributes:
        before: text before the system message. It replaces the template's opening, or follows the text before the last
            user message if `is_late`.
        behind: text between the system message and the user's content.
        is_late: whether the system message is placed in the last turn instead of the first.
        strips: whether white space around it is removed.
        joins: whether it forms one text with the user's content, of which only trailing white space is removed.
        skips_empty: whether an empty system message is treated as absent.
    """

    before: str
    behind: str
    is_late: bool = False
    strips: bool = False
    joins: bool = False
    skips_empty: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """The texts that a template puts between the contents of messages. Any of them may contain a date, see DATE_OPENS.

    Attributes:
        opening: text before the first user's content if there is no system message.
        answer: text between a user's content and the assistant's answer to it.
        again: text between an answer and the next user's content.
        ask: text after the last user's content, which prompts the model to answer.
        strips_user, strips_assistant: whether white space around these contents is removed.
        system: placement of a system message; None if the template does not accept one.
        thought_end: marker that ends a thought, such as </think>. In earlier answers, everything up to the last marker
            is removed. Empty if earlier answers are kept unchanged.
        thought_strips: characters that are removed directly after the marker.
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
        """Returns the whole text in parts. Only parts that come from the template may contain special tokens.

        Args:
            now: time of the conversation; None for the current time.

        Raises:
            InputError: the roles do not alternate, or the template does not accept a system message.
        """
        found, clock = self._parts(messages), now or datetime.now()
        return [
            part._replace(text=_DATE.sub(lambda match: clock.strftime(match[1]), part.text))
            if part.parse_special
            else part
            for part in found
        ]

    def _parts(self, messages: Sequence[Message]) -> list[Part]:
        """Returns the whole text in parts, with dates still as their formats."""
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
        """Returns the whole text, as the original Jinja template renders it; see `parts`."""
        return "".join(part.text for part in self.parts(messages, now))

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Returns the ids of the whole text. No BOS is added, because the template itself includes it.

        Raises:
            InputError: as in `parts`; or a content contains a marker that the template puts between messages and that
                the tokenizer cannot encode as ordinary text.
        """
        parts = self.parts(messages)
        own = "".join(part.text for part in parts if part.parse_special)
        check_contents(tokenizer, own, [part.text for part in parts if not part.parse_special])
        return tokenizer.encode_parts(parts)

    def end_id(self, tokenizer: Tokenizer, bos_id: int | None) -> int | None:
        """Returns the id that ends an answer: the first special or marker token after it. None if there is none."""
        return end_id(self.again, tokenizer, bos_id)

    def stop_ids(self, tokenizer: Tokenizer, bos_id: int | None, others: Sequence[int]) -> tuple[int, ...]:
        """Returns the ids that end an answer: those in `others`, and `end_id`."""
        return with_end(others, self.end_id(tokenizer, bos_id))

    def to_json(self) -> dict[str, Any]:
        """Returns the template as a JSON object."""
        return asdict(self)

    @staticmethod
    def from_json(text: str) -> "ChatTemplate":
        """Reads a template from its JSON form.

        Raises:
            InputError: the text is not a template.
        """
        try:
            fields = json.loads(text)
            system = fields.pop("system")
            return ChatTemplate(**fields, system=SystemPlace(**system) if system else None)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(f"the file's chat template cannot be read ({error}); export it again") from error

    def _checked(self, messages: Sequence[Message]) -> tuple[str | None, list[str]]:
        """Returns the system message, or None, and the other contents.

        Raises:
            InputError: as in `parts`.
        """
        roles = [role for role, _ in messages]
        has_system = roles[:1] == [SYSTEM]
        turns = roles[has_system:]
        if len(turns) % 2 == 0 or turns != [ASSISTANT if i % 2 else USER for i in range(len(turns))]:
            raise InputError(
                f"the roles of the messages are {', '.join(roles) or 'none'}; give user and assistant in turns, the "
                "user first and last, and before them at most one of system"
            )
        if has_system and self.system is None:
            raise InputError("the chat template supports no system message; leave it out")
        system = messages[0][1] if has_system else None
        if self.system and self.system.skips_empty and system == "":
            system = None
        return system, [content for _, content in messages[has_system:]]

    def _answered(self, content: str) -> str:
        """Returns an earlier answer without its thoughts: the text after the last `thought_end`."""
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
    """Returns the id of the first special or marker token in the text after an answer. None if there is none or if it
    is BOS.
    """
    texts = {**tokenizer.specials, **_markers(tokenizer.fixed)}
    found = any_of(texts).search(behind)
    token = texts[found[0]] if found else None
    return None if token == bos_id else token


def with_end(others: Sequence[int], end_id: int | None) -> tuple[int, ...]:
    """Returns the stop ids `others` with `end_id` added unless it is None or already among them."""
    return (*others, *(() if end_id is None or end_id in others else (end_id,)))


def check_contents(tokenizer: Tokenizer, own: str, contents: Sequence[str]) -> None:
    """Checks that no content contains a marker that would be taken for the template's own.

    Args:
        own: text that the template puts between contents.

    Raises:
        InputError: a content contains a marker of the template that the tokenizer cannot encode as ordinary text.
    """
    for text in _markers(tokenizer.fixed):
        if text in own and any(text in content for content in contents):
            raise InputError(f"a message holds {text}, which separates messages; leave it out")


def _markers(texts: Mapping[str, int]) -> dict[str, int]:
    """Returns the entries whose text contains a letter or digit, so not only spaces, line ends or punctuation."""
    return {text: i for text, i in texts.items() if re.search("[0-9A-Za-z]", text)}


def _of_turns(bos: str, before: str, behind: str, assistant: str = ASSISTANT, **options: Any) -> ChatTemplate:
    """Returns a template in which all messages have the same form. `before` contains {} in place of the role's name."""
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
"""Predefined templates of Llama 2 and 3, ChatML, Mistral's first Instruct models, and Gemma."""

_CONTROLS = {
    "llama2": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
}
"""Control tokens that each predefined template requires in the tokenizer."""


def named(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the predefined template of a name.

    Raises:
        InputError: there is no template of that name, or the tokenizer lacks one of its tokens.
    """
    if name not in NAMED:
        raise InputError(f"--chat-template {name} is unknown; choose from {', '.join(NAMED)}")
    if missing := [text for text in _CONTROLS[name] if text not in tokenizer.specials and text not in tokenizer.fixed]:
        raise InputError(f"--chat-template {name} needs {listed(missing)}, which the tokenizer lacks; give another")
    return NAMED[name]
