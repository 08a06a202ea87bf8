"""Selection of the chat template for a file, and reduction of Jinja templates to data for runners without Jinja.

The data form is tested against the Jinja template on many conversations, with contents of every kind and random ones.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from export.checkpoints.checkpoint import Checkpoint
from model.errors import InputError
from preproc.chat_template import (
    ASSISTANT,
    DATE_CLOSES,
    DATE_OPENS,
    NAMED,
    SYSTEM,
    USER,
    ChatTemplate,
    Message,
    SystemPlace,
    named,
)
from preproc.jinja_template import JinjaTemplate, RefusalError, to_file
from preproc.tokenizer import Tokenizer

NO_TEMPLATE = "none"

_FIX = f"give --chat-template {', '.join(NAMED)}, FILE.jinja or {NO_TEMPLATE}"

_WORDS = {SYSTEM: "Zumpango", USER: "Quixotry", ASSISTANT: "Fjordlund"}
"""Contents of the first conversations, at which the rendered text is split. They do not occur in any template."""

_SPACE = "\n \n"

_CONTENTS = (
    "Hello there!",
    " \n two lines,\n\n and space around them\t\n",
    "Grüße, 日本語 \N{SLIGHTLY SMILING FACE}\N{NO-BREAK SPACE}",
    "",
    "  \n",
    "{{ 7 * 7 }} {% if x %} {# y #} <b>&amp;</b> 'single' \"double\" \\n \r\n end",
    "<think>\nWhy?\n</think>\n\nBecause.",
    '{"name": "f", "parameters": {"x": 1}}',
)
"""Contents of the conversations on which a reduced template is tested."""


_THOUGHTS = (("", ""), ("</think>", "\n"), ("</think>", ""), ("</think>", " \t\n\r\v\f"))
"""Ways in which templates shorten earlier answers: not at all, or by removing everything up to an end marker and the
given characters after it.
"""

_DAYS = (datetime(2024, 7, 6, 5, 4, 3), datetime(2031, 12, 25, 16, 17, 18))
"""Times at which a reduced template is tested."""


_PIECES = (*_CONTENTS, "\n", " ", "\t", "a", "Z", "é", "<think>", "</think>", "\n\n", "日", "|", "</s>", "```", "{%")
"""Pieces from which random contents are put together."""


class _Format:
    """A clock whose strftime returns the format itself between marks."""

    @staticmethod
    def strftime(form: str) -> str:
        return f"{DATE_OPENS}{form}{DATE_CLOSES}"


def reduced(jinja: JinjaTemplate) -> ChatTemplate:
    """Reduces a template to data, and tests on other conversations that both give the same texts.

    Raises:
        InputError: the template cannot be reduced. The message names a difference.
    """
    template = _derived(replace(jinja, clock=_Format))
    differences = []
    for end, strips in _THOUGHTS:
        found = replace(template, thought_end=end, thought_strips=strips)
        difference = next(_differences(jinja, found), None)
        if difference is None:
            return found
        differences.append(difference)
    raise InputError(f"it cannot be reduced to data: {differences[0]}")


def _differences(jinja: JinjaTemplate, template: ChatTemplate) -> Iterator[str]:
    """Yields differences between the texts of both templates for the same messages, in words."""
    for now in _DAYS:
        timed = replace(jinja, clock=partial(_same, now))
        for messages in _conversations(with_system=template.system is not None):
            theirs, ours = _text(timed, messages), template.text(messages, now)
            if theirs != ours:
                yield _difference(messages, theirs, ours)


def _same(now: datetime) -> datetime:
    return now


def _text(jinja: JinjaTemplate, messages: Sequence[Message]) -> str | None:
    """Returns the text of messages; None if the template rejects them."""
    try:
        return jinja.text(messages)
    except RefusalError:
        return None


def _derived(jinja: JinjaTemplate) -> ChatTemplate:
    """Derives a template from the texts around the contents of the first conversations."""
    opening, ask = _around(jinja, [USER])
    first, answer, again, last = _around(jinja, [USER, ASSISTANT, USER])
    if (first, last) != (opening, ask):
        raise InputError("it cannot be reduced to data: the first turn changes if more follow")
    spaced = _around(jinja, [USER, ASSISTANT, USER], spaced=ASSISTANT)
    strips_user = _strips(USER, (opening, ask), _around(jinja, [USER], spaced=USER))
    return ChatTemplate(
        opening,
        answer,
        again,
        ask,
        strips_user=strips_user,
        strips_assistant=_strips(ASSISTANT, (answer, again), spaced[1:3]),
        system=_system(jinja, opening, again, strips_user),
    )


def _system(jinja: JinjaTemplate, opening: str, again: str, strips_user: bool) -> SystemPlace | None:
    """Returns the placement of a system message; None if the template rejects it or leaves it out."""
    text = _text(jinja, _probe([SYSTEM, USER]))
    if text is None or _WORDS[SYSTEM] not in text:
        return None
    before, behind, ask = _around(jinja, [SYSTEM, USER])
    roles = [SYSTEM, USER, ASSISTANT, USER]
    longer = _text(jinja, _probe(roles)) or ""
    is_late = longer.find(_WORDS[SYSTEM]) > longer.find(_WORDS[USER])
    if is_late:
        opens = _around(jinja, roles, order=[USER, ASSISTANT, SYSTEM, USER])[2]
        if not before.startswith(opening) or opens != again + before.removeprefix(opening):
            raise InputError("it cannot be reduced to data: a system message in the last turn changes that turn")
    spaced = _around(jinja, [SYSTEM, USER], spaced=SYSTEM)
    around_user = _around(jinja, [SYSTEM, USER], spaced=USER)[1:]
    return SystemPlace(
        before.removeprefix(opening) if is_late else before,
        behind,
        is_late=is_late,
        strips=_strips(SYSTEM, (before, behind), spaced[:2]),
        joins=strips_user and around_user == [behind + _SPACE, ask],
        skips_empty=_text(jinja, [(SYSTEM, ""), (USER, _WORDS[USER])]) == _text(jinja, _probe([USER])),
    )


def _probe(roles: Sequence[str], spaced: str | None = None) -> list[Message]:
    return [(role, f"{_SPACE}{_WORDS[role]}{_SPACE}" if role == spaced else _WORDS[role]) for role in roles]


def _around(
    jinja: JinjaTemplate, roles: Sequence[str], spaced: str | None = None, order: Sequence[str] | None = None
) -> list[str]:
    """Returns the texts before, between and after the contents of messages with the given roles.

    Args:
        spaced: role whose contents are surrounded by white space.
        order: order of the contents in the text, if it differs from that of the roles.

    Raises:
        InputError: the template rejects the messages, or leaves out or moves a content.
    """
    text = _text(jinja, _probe(roles, spaced))
    if text is None:
        raise InputError(f"it cannot be reduced to data: it refuses the roles {', '.join(roles)}")
    pieces = list[str]()
    for role in order or roles:
        piece, found, text = text.partition(_WORDS[role])
        if not found:
            raise InputError(f"it cannot be reduced to data: it leaves out or moves a {role} message")
        pieces.append(piece)
    return [*pieces, text]


def _strips(role: str, plain: Sequence[str], spaced: Sequence[str]) -> bool:
    """Returns whether white space around a role's content is removed, judged by the text around it without and with
    white space.

    Raises:
        InputError: the white space is neither kept nor removed.
    """
    if list(spaced) == list(plain):
        return True
    before, behind = plain
    if list(spaced) == [before + _SPACE, _SPACE + behind]:
        return False
    raise InputError(f"it cannot be reduced to data: it changes white space in a {role} message")


def _conversations(with_system: bool) -> Iterator[list[Message]]:
    """Yields conversations of 1 to 4 turns: each content in each place, different contents together, and random
    contents.
    """
    chance = random.Random(0)
    for turns in range(1, 5):
        for shift in range(len(_CONTENTS)):
            for system in [None, *(_CONTENTS if with_system else ())]:
                yield _talk(system, [_CONTENTS[(shift + 3 * i) % len(_CONTENTS)] for i in range(2 * turns - 1)])
        for _ in range(20):
            said = ["".join(chance.choices(_PIECES, k=chance.randrange(8))) for _ in range(2 * turns)]
            yield _talk(said[0] if with_system and chance.random() < 0.5 else None, said[1:])


def _talk(system: str | None, contents: Sequence[str]) -> list[Message]:
    messages = [(ASSISTANT if i % 2 else USER, content) for i, content in enumerate(contents)]
    return messages if system is None else [(SYSTEM, system), *messages]


def _difference(messages: Sequence[Message], theirs: str | None, ours: str) -> str:
    """Describes the difference between two texts of the same messages."""
    told = ", ".join(f"{role} {content!r}" for role, content in messages)
    if theirs is None:
        return f"it refuses the messages {told}"
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    excerpts = (text[max(at - 20, 0) : at + 20] for text in (theirs, ours))
    return "for the messages {} it gives ...{!r}... instead of ...{!r}...".format(told, *excerpts)


@dataclass(frozen=True)
class Chosen:
    """The chat template selected for a file.

    Attributes:
        file: JSON object for the file, see `preproc.jinja_template.to_file`; None if it has no template.
        template: the template itself.
        warnings: messages for the user before the export.
    """

    file: dict[str, Any] | None = None
    template: JinjaTemplate | ChatTemplate | None = None
    warnings: tuple[str, ...] = ()


def chosen(option: str | None, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Chosen:
    """Returns the template named by --chat-template, or the checkpoint's own. Errors in the checkpoint's template are
    only warnings.

    Raises:
        InputError: the option names no template, its file has no valid one, or there is no tokenizer.
    """
    if option == NO_TEMPLATE or (option is None and (tokenizer is None or checkpoint.chat.template is None)):
        return Chosen()
    if tokenizer is None:
        raise InputError(f"--chat-template {option} needs a tokenizer; leave --chat-template or --tokenizer none out")
    if option in NAMED:
        data = named(str(option), tokenizer)
        return Chosen(to_file(None, data), data)
    jinja = JinjaTemplate(_source(option, checkpoint), *_tokens(checkpoint, tokenizer))
    try:
        _text(jinja, _probe([USER]))
    except InputError as error:
        if option is not None:
            raise InputError(f"--chat-template {option}: {error}; {_FIX}") from error
        return Chosen(warnings=(f"warning: the file will have no chat template, because {error}; {_FIX}",))
    try:
        data = reduced(jinja)
        _check_parts(data, tokenizer)
    except InputError as error:
        warning = f"warning: only the Python runtime can render the chat template; llama_runner cannot: {error}"
        return Chosen(to_file(jinja, None), jinja, (warning,))
    return Chosen(to_file(jinja, data), jinja)


def _check_parts(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Checks that a text encoded in parts has the same ids as the whole text.

    Raises:
        InputError: the ids differ.
    """
    specials = tuple(tokenizer.specials)
    now = _DAYS[0]
    for messages in _conversations(with_system=template.system is not None):
        if any(special in content for _, content in messages for special in specials):
            continue
        whole = tokenizer.encode(template.text(messages, now), parse_special=True)
        if tokenizer.encode_parts(template.parts(messages, now)) != whole:
            raise InputError("the whole text has other tokens than its parts")


def _source(option: str | None, checkpoint: Checkpoint) -> str:
    if option is None:
        return str(checkpoint.chat.template)
    path = Path(option)
    if not path.is_file():
        raise InputError(f"--chat-template {option} is neither a file nor a known name; {_FIX}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--chat-template {option} is not UTF-8 text; {_FIX}") from error


def _tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[str, str]:
    """Returns the texts of BOS and EOS: those given by the checkpoint, otherwise those of the ids."""
    texts = {i: text for text, i in tokenizer.specials.items()}
    bos_id = tokenizer.bos_id if checkpoint.bos_id is None else checkpoint.bos_id
    stop_ids = checkpoint.stop_ids or tokenizer.stop_ids
    bos = texts.get(bos_id, "") if bos_id is not None else ""
    eos = texts.get(stop_ids[0], "") if stop_ids else ""
    chat = checkpoint.chat
    return bos if chat.bos_token is None else chat.bos_token, eos if chat.eos_token is None else chat.eos_token
