"""reduced(source, ...): a checkpoint's Jinja chat template becomes data, and is proven to make the same texts."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import InputError
from model.layouts.common import Checkpoint
from preproc.chat import ASSISTANT, NAMED, SYSTEM, USER, ChatTemplate, Message, SystemPlace, named
from preproc.tokenizer import Tokenizer

NO_TEMPLATE = "none"

_FIX = f"give --chat-template {', '.join(NAMED)}, FILE.jinja or {NO_TEMPLATE}"

_WORDS = {SYSTEM: "Zumpango", USER: "Quixotry", ASSISTANT: "Fjordlund"}
"""Contents of the first conversations. A template is split at them, so they are nothing that one would hold."""

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
"""Contents of the conversations that a reduced template is tried on."""


class _RefusalError(TemplateError):
    """What raise_exception raises: the template does not take such messages."""


class _Unset(Undefined):
    """A variable that templates are not given. They may ask whether it is there, and not write it."""

    def __str__(self) -> str:
        self._fail_with_undefined_error()


class _Generation(Extension):
    """transformers' {% generation %}, which only marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Jinja:
    """A template as transformers renders it, but for the clock, which it is not given."""

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        """Compiles it.

        Raises:
            InputError: it is no Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], undefined=_Unset
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise InputError(
                f"line {error.lineno} of the chat template is no Jinja ({error.message}); {_FIX}"
            ) from error

    def text(self, messages: Sequence[Message]) -> str | None:
        """The text of messages with what asks for an answer; None where the template refuses them.

        Raises:
            InputError: it fails otherwise.
        """
        given = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(
                messages=given, tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
        except _RefusalError:
            return None
        except Exception as error:  # what a template does is not known, and what its expressions raise neither
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"the chat template cannot be rendered ({reason}); {_FIX}") from error


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> str:
    raise _RefusalError(message)


def reduced(source: str, bos_token: str, eos_token: str) -> ChatTemplate:
    """The template as data, of which other conversations have shown that it makes the same texts.

    Raises:
        InputError: it cannot be reduced; names what differs.
    """
    jinja = Jinja(source, bos_token, eos_token)
    template = _derived(jinja)
    for messages in _conversations(with_system=template.system is not None):
        theirs, ours = jinja.text(messages), template.text(messages)
        if theirs != ours:
            raise InputError(f"the chat template cannot be reduced: {_difference(messages, theirs, ours)}; {_FIX}")
    return template


def _derived(jinja: Jinja) -> ChatTemplate:
    """What the contents of the first conversations lie between."""
    opening, ask = _around(jinja, [USER])
    first, answer, again, last = _around(jinja, [USER, ASSISTANT, USER])
    if (first, last) != (opening, ask):
        raise InputError(f"the chat template cannot be reduced: a first turn looks other when more follow; {_FIX}")
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


def _system(jinja: Jinja, opening: str, again: str, strips_user: bool) -> SystemPlace | None:
    """How a system message is given; None where the template refuses it or leaves it out."""
    text = jinja.text(_probe([SYSTEM, USER]))
    if text is None or _WORDS[SYSTEM] not in text:
        return None
    before, behind, ask = _around(jinja, [SYSTEM, USER])
    roles = [SYSTEM, USER, ASSISTANT, USER]
    longer = jinja.text(_probe(roles)) or ""
    is_late = longer.find(_WORDS[SYSTEM]) > longer.find(_WORDS[USER])
    if is_late:
        opens = _around(jinja, roles, order=[USER, ASSISTANT, SYSTEM, USER])[2]
        if not before.startswith(opening) or opens != again + before.removeprefix(opening):
            raise InputError(f"the chat template cannot be reduced: a late system message changes its turn; {_FIX}")
    spaced = _around(jinja, [SYSTEM, USER], spaced=SYSTEM)
    around_user = _around(jinja, [SYSTEM, USER], spaced=USER)[1:]
    return SystemPlace(
        before.removeprefix(opening) if is_late else before,
        behind,
        is_late=is_late,
        strips=_strips(SYSTEM, (before, behind), spaced[:2]),
        joins=strips_user and around_user == [behind + _SPACE, ask],
        skips_empty=jinja.text([(SYSTEM, ""), (USER, _WORDS[USER])]) == jinja.text(_probe([USER])),
    )


def _probe(roles: Sequence[str], spaced: str | None = None) -> list[Message]:
    return [(role, f"{_SPACE}{_WORDS[role]}{_SPACE}" if role == spaced else _WORDS[role]) for role in roles]


def _around(
    jinja: Jinja, roles: Sequence[str], spaced: str | None = None, order: Sequence[str] | None = None
) -> list[str]:
    """What the contents of messages of such roles lie between.

    Args:
        spaced: the role whose contents have white space around them.
        order: that of the contents in the text, where it is another.
    """
    text = jinja.text(_probe(roles, spaced))
    if text is None:
        raise InputError(f"the chat template refuses messages of {', '.join(roles)}; {_FIX}")
    pieces = list[str]()
    for role in order or roles:
        piece, found, text = text.partition(_WORDS[role])
        if not found:
            raise InputError(f"the chat template leaves out or moves a message of {role}; {_FIX}")
        pieces.append(piece)
    return [*pieces, text]


def _strips(role: str, plain: Sequence[str], spaced: Sequence[str]) -> bool:
    """Whether white space around a role's content falls away, by what lies around it without and with some."""
    if list(spaced) == list(plain):
        return True
    before, behind = plain
    if list(spaced) == [before + _SPACE, _SPACE + behind]:
        return False
    raise InputError(f"the chat template cannot be reduced: it changes white space in what is of {role}; {_FIX}")


def _conversations(with_system: bool) -> Iterator[list[Message]]:
    """Of 1 to 4 turns: each content in each place, and different ones together."""
    systems: list[str | None] = [None, *(_CONTENTS if with_system else ())]
    for turns in range(1, 5):
        for shift in range(len(_CONTENTS)):
            for system in systems:
                contents = [_CONTENTS[(shift + 3 * i) % len(_CONTENTS)] for i in range(2 * turns - 1)]
                messages = [(ASSISTANT if i % 2 else USER, content) for i, content in enumerate(contents)]
                yield messages if system is None else [(SYSTEM, system), *messages]


def _difference(messages: Sequence[Message], theirs: str | None, ours: str) -> str:
    """What differs, in words."""
    told = ", ".join(f"{role} {content!r}" for role, content in messages)
    if theirs is None:
        return f"it refuses the messages {told}"
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    excerpts = (text[max(at - 20, 0) : at + 20] for text in (theirs, ours))
    return "of the messages {} it makes ...{!r}... and not ...{!r}...".format(told, *excerpts)


def chosen(option: str | None, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The template that a file is to carry: the one that --chat-template names, or the checkpoint's own; or None.

    Raises:
        InputError: it cannot be reduced, or there is none of that name.
    """
    if option == NO_TEMPLATE or (option is None and (tokenizer is None or checkpoint.chat.template is None)):
        return None
    if tokenizer is None:
        raise InputError(f"--chat-template {option} needs a tokenizer; leave it out, or --tokenizer none")
    if option in NAMED:
        return named(str(option), tokenizer)
    template = reduced(_source(option, checkpoint), *_tokens(checkpoint, tokenizer))
    for messages in _conversations(with_system=template.system is not None):
        if template.encode(messages, tokenizer) != tokenizer.encode(template.text(messages), parse_special=True):
            raise InputError(f"the tokenizer takes the chat template's text for other tokens than its parts; {_FIX}")
    return template


def _source(option: str | None, checkpoint: Checkpoint) -> str:
    if option is None:
        return str(checkpoint.chat.template)
    path = Path(option)
    if not path.is_file():
        raise InputError(f"--chat-template {option} is neither a file nor a name; {_FIX}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--chat-template {option} is no text; {_FIX}") from error


def _tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[str, str]:
    """The texts of BOS and EOS: those that the checkpoint names, or those of the ids."""
    texts = {i: text for text, i in tokenizer.specials.items()}
    bos_id = tokenizer.bos_id if checkpoint.bos_id is None else checkpoint.bos_id
    stop_ids = checkpoint.stop_ids or tokenizer.stop_ids
    bos = texts.get(bos_id, "") if bos_id is not None else ""
    eos = texts.get(stop_ids[0], "") if stop_ids else ""
    chat = checkpoint.chat
    return bos if chat.bos_token is None else chat.bos_token, eos if chat.eos_token is None else chat.eos_token
