"""Function calls in a model's answer: reads and writes them in the forms of several checkpoints, and makes grammars."""

import json
import secrets
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.serving.request_body import no_number
from runtime.text.constraint import json_rule

_BETWEEN = " \t\r\n;,"
"""Characters that may separate calls."""

_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a function without parameters."""


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        name: name of the function.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class Form:
    """The form in which a model writes calls: JSON objects with a name and arguments.

    Attributes:
        opening: text before a call, or before the list of all calls.
        closing: text after a call; empty for none.
        key: key of the arguments in the object.
        is_listed: whether calls are written as one list after a single opening, at the end of the answer.
        is_bare: whether a call may be written without an opening.
        id_length: number of letters and digits in a call's id; None for ids like OpenAI's.
    """

    opening: str
    closing: str = ""
    key: str = "arguments"
    is_listed: bool = False
    is_bare: bool = False
    id_length: int | None = None

    def new_id(self) -> str:
        """Returns a new random id for a call."""
        if self.id_length is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(self.id_length))

    def render(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Returns the text of calls, each given as a name and arguments, in this form."""
        objects = [json.dumps({"name": name, self.key: given}, ensure_ascii=False) for name, given in calls]
        if self.is_listed:
            return f"{self.opening}[{', '.join(objects)}]{self.closing}"
        if self.is_bare:
            return "\n".join(objects)
        return "\n".join(f"{self.opening}\n{each}\n{self.closing}" for each in objects)

    def shown_ids(self, specials: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the special tokens for opening and closing, which must appear in the text for calls to be found."""
        return tuple(specials[text] for text in (self.opening, self.closing) if text in specials)


HERMES = Form("<tool_call>", "</tool_call>")
"""The form of Hermes 2 Pro, Qwen 2.5 and 3, and SmolLM; also used for checkpoints that were not trained on calls."""

LLAMA3 = Form("<|python_tag|>", key="parameters", is_bare=True)
"""The form of Llama 3.1, 3.2 and 3.3."""

MISTRAL = Form("[TOOL_CALLS]", is_listed=True, id_length=9)
"""The form of Mistral v0.3 and Nemo, whose templates refuse ids of another length."""

GRANITE = Form("<|tool_call|>", "<|/tool_call|>", is_listed=True)
"""The form of Granite 3 and, with the closing, Phi-4-mini."""


def form_of(source: str) -> Form:
    """Returns the form whose opening occurs in a template's source, or Hermes' form if none does."""
    if '"parameters": dictionary' in source:  # in Llama 3.2's template, where the opening depends on the turn
        return LLAMA3
    return next((form for form in (MISTRAL, GRANITE, LLAMA3) if form.opening in source), HERMES)


def call_rules(form: Form, functions: Sequence[Mapping[str, Any]], several: bool, specials: Mapping[str, int]) -> str:
    """Returns the rule `calls` of a grammar in llguidance's Lark, with the rules that it uses.

    It matches one call, or several if `several`. The arguments must match the function's parameters.

    Args:
        functions: the functions that may be called, as OpenAI's API describes them.
        specials: the tokenizer's special tokens, which may include the opening and closing.
    """
    opening = f"<[{specials[form.opening]}]>" if form.opening in specials else json.dumps(form.opening)
    closing = f"<[{specials[form.closing]}]>" if form.closing in specials else json.dumps(form.closing)
    if form.is_listed:
        more = '(", " object)*' if several else ""
        rules = [f'calls: {opening} " "? "[" object {more} "]"']
    elif form.is_bare:
        rules = ["calls: object"]
    else:
        more = '("\\n" call)*' if several else ""
        rules = [f"calls: call {more}", f'call: {opening} "\\n" object "\\n" {closing}']
    rules.append("object: " + " | ".join(f"object_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "{form.key}": ')
        rules += [f'object_{i}: {head} arguments_{i} "}}"']
        rules += [f"arguments_{i}: {json_rule(function.get('parameters') or _NOTHING)}"]
    return "\n".join(rules)


class CallReader:
    """A reader that splits an answer into text and calls, piece by piece.

    Text that may be the beginning of a call is held back until that is certain. Text that is no valid call is output as
    text.
    """

    def __init__(self, form: Form, names: Collection[str]) -> None:
        """Starts an empty answer.

        Args:
            names: names of the functions; a call without an opening is only read as a call if it names one of them.
        """
        self._form, self._names = form, names
        self._held = ""
        self._is_open = False
        self._is_bare = form.is_bare  # whether the next character may open a call
        self._calls = 0

    def add(self, text: str) -> list[str | Call]:
        """Adds the next piece and returns the texts and calls that are certain now."""
        self._held += text
        return list(self._certain())

    def finish(self) -> list[str | Call]:
        """Ends the answer and returns the texts and calls that were held back."""
        held, self._held = self._held, ""
        if self._is_open:
            return list(self._parse(held))
        held = held.rstrip() if self._calls else held
        return [held] if held else []

    def _certain(self) -> Iterator[str | Call]:
        while True:
            if self._is_open:
                end = self._end()
                if end is None:
                    return
                yield from self._parse(self._held[:end])
                self._held, self._is_open = self._held[end:], False
                continue
            if self._is_bare and (self._held.lstrip() or "{")[0] == "{":
                if not self._held.strip():
                    return
                self._is_open = True
                continue
            start = self._held.find(self._form.opening)
            self._is_open = start >= 0
            yield from self._text(self._held[:start].rstrip() if self._is_open else self._plain())
            self._held = self._held[start:] if self._is_open else self._held
            if not self._is_open:
                return

    def _plain(self) -> str:
        """Removes from the held text, and returns, what cannot belong to an opening or to white space before one."""
        held, opening = self._held, self._form.opening
        begun = max(len(held) - len(opening) + 1, 0)
        while begun < len(held) and not opening.startswith(held[begun:]):
            begun += 1
        begun = len(held[:begun].rstrip())
        self._held = held[begun:]
        return held[:begun]

    def _text(self, text: str) -> Iterator[str]:
        if text:
            self._is_bare = False
            yield text

    def _end(self) -> int | None:
        """Returns the index at which the held call ends, or None if that is not known yet."""
        opening, closing = self._form.opening, self._form.closing
        if not closing or self._form.is_listed:
            return None
        end = first = self._held.find(closing)
        while end >= 0:
            if self._read(self._held[len(opening) : end])[0]:
                return end + len(closing)
            end = self._held.find(closing, end + 1)
        if first < 0 or _is_in_a_string(self._held[len(opening) : first]):
            return None
        return first + len(closing)

    def _parse(self, text: str) -> Iterator[str | Call]:
        """Yields the calls at the beginning of a text and then the rest of it; only the text, if there are no calls."""
        calls, rest = self._read(text)
        self._calls += len(calls)
        self._is_bare = False
        yield from calls
        if rest := rest.strip() if calls else text:
            yield rest

    def _read(self, text: str) -> tuple[list[Call], str]:
        """Returns the calls at the beginning of a text, and the text after them."""
        calls, is_bare = list[Call](), not text.lstrip().startswith(self._form.opening) and self._form.is_bare
        while rest := self._unmarked(text):
            try:
                value, end = _JSON.raw_decode(rest)
                found = [self._call(each, is_bare) for each in (value if isinstance(value, list) else [value])]
            except (ValueError, RecursionError):
                return calls, text
            calls += found
            text = rest[end:]
        return calls, ""

    def _unmarked(self, text: str) -> str:
        """Returns the text without separators, closings and openings before the next call."""
        for mark in (self._form.closing, self._form.opening):
            text = text.lstrip(_BETWEEN).removeprefix(mark)
        return text.lstrip(_BETWEEN)

    def _call(self, value: Any, is_bare: bool) -> Call:
        """Returns the call that a JSON value describes.

        Raises:
            ValueError: the value is no call.
        """
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or not name or (is_bare and name not in self._names):
            raise ValueError(f"{name} is not a function's name")
        given = value.get("arguments", value.get("parameters", {}))
        if isinstance(given, str):
            given = _JSON.decode(given)
        if not isinstance(given, dict):
            raise ValueError(f"{given} are not arguments")
        arguments = json.dumps(given, ensure_ascii=False, allow_nan=False)
        (name + arguments).encode()  # fails for half of a surrogate pair
        return Call(name, arguments)


def _is_in_a_string(text: str) -> bool:
    """Returns whether a JSON text ends inside a string."""
    try:
        _JSON.decode(text.strip())
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False


_JSON = json.JSONDecoder(strict=False, parse_constant=no_number)
