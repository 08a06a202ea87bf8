"""Requests in OpenAI's form (https://platform.openai.com/docs/api-reference), read and checked: JSON -> Order.

Beside OpenAI's parameters, requests may have the sampler's others: top_k, min_p, repetition_penalty, penalty_window.
What is unknown is ignored. What would have to change the answer, and cannot, is refused.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, NoReturn

from export.metadata import Metadata
from model.errors import InputError
from preproc.chat import NAMED, SYSTEM, Message
from preproc.jinja_template import Carried
from preproc.tokenizer import Tokenizer
from runtime.constrain import Constraint, json_grammar
from runtime.generate import prompt_ids
from runtime.generation import GenerationOptions
from runtime.program import Program
from runtime.sampler import SamplingOptions
from runtime.session import check_tokens

COMPLETION_TOKENS = 16
"""How many tokens /v1/completions gives unless asked for more, as OpenAI's does."""

MOST_STOPS, MOST_BIASES, MOST_LOGPROBS = 16, 1024, 20

LIKELIEST = 1e-9
"""What top_p 0 stands for: a probability that the likeliest token alone reaches."""

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (0, 1),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "modalities": (["text"],),
    "audio": (),
}
"""Parameters that cannot be honoured, with the values that ask for nothing; null does so, too."""


class RequestError(Exception):
    """A request that gets no answer but an error in OpenAI's form.

    Attributes:
        status: the HTTP status.
        content: the response's JSON.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(status, "invalid_request_error")
        self.status = status
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        name: that requests call it by.
        created: when the file was made, in seconds since 1970.
        program, tokenizer: of the file.
        template: how messages become a text; None where nothing says.
    """

    name: str
    created: int
    program: Program
    tokenizer: Tokenizer
    template: Carried | None

    @property
    def metadata(self) -> Metadata:
        """All that the file carries beside graph and weights."""
        return self.program.metadata


@dataclass(frozen=True)
class Order:
    """What a request asks for.

    Attributes:
        is_chat: whether the answer is a message in place of a text.
        prompt: its ids; they fit in the context.
        options, constraint: see `runtime.generation.generate`.
        seed: as given, or one that is new every time.
        stream: whether the answer is told step by step.
        include_usage: whether the end of a stream tells how many tokens there were.
    """

    is_chat: bool
    prompt: Sequence[int]
    options: GenerationOptions
    constraint: Constraint | None
    seed: int
    stream: bool
    include_usage: bool


def read_completion(raw: bytes, model: Model) -> Order:
    """Reads the body of POST /v1/completions.

    Raises:
        RequestError: it cannot be answered.
    """
    values = _Values(raw, model)
    prompt = values.prompt(model)
    logprobs = values.whole("logprobs", 0, MOST_LOGPROBS)
    limit = values.limit(("max_tokens",), COMPLETION_TOKENS)
    options = values.options(logprobs, limit, model.metadata.stop_ids)
    return values.order(False, prompt, options, model)


def read_chat(raw: bytes, model: Model) -> Order:
    """Reads the body of POST /v1/chat/completions.

    Raises:
        RequestError: it cannot be answered.
    """
    values = _Values(raw, model)
    prompt, stop_ids = values.conversation(model)
    top = values.whole("top_logprobs", 0, MOST_LOGPROBS)
    logprobs = (top or 0) if values.flag("logprobs") else None
    if top is not None and logprobs is None:
        refuse("top_logprobs", f"top_logprobs {top} is impossible without logprobs; add logprobs: true")
    limit = values.limit(("max_completion_tokens", "max_tokens"), None)
    options = values.options(logprobs, limit, stop_ids)
    return values.order(True, prompt, options, model)


def refuse(param: str | None, message: str, code: str | None = None) -> NoReturn:
    """Raises:
    RequestError: with status 400.
    """
    raise RequestError(400, message, param, code)


@contextmanager
def _blamed_on(param: str) -> Iterator[None]:
    """What the library refuses is a parameter's fault."""
    try:
        yield
    except InputError as error:
        refuse(param, str(error))


class _Values:
    """A body's values, checked as they are taken. One that is null counts as none, as with OpenAI."""

    def __init__(self, raw: bytes, model: Model) -> None:
        values = _object(raw)
        self._values: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        self._recommended = model.metadata.sampling
        name = self._values.get("model", model.name)
        if name != model.name:
            message = f"the model {_shown(name)} is not served here; give {_shown(model.name)}, or leave it out"
            raise RequestError(404, message, "model", "model_not_found")
        if self._values.get("tool_choice") == "none":
            self._values.pop("tools", None)
        for param, harmless in _HARMLESS.items():
            if param in self._values and self._values[param] not in harmless:
                fix = f"give {_shown(harmless[0])}" if harmless else "leave it out"
                refuse(param, f"{param} {_shown(self._values[param])} is not possible here; {fix}", "unsupported_value")

    def whole(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        """A whole number."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            refuse(name, f"{name} {_shown(value)} is no whole number; give one")
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"{low} or more" if high is None else f"{low} to {high}"
            refuse(name, f"{name} {value} is impossible; give {bounds}")
        return value

    def limit(self, names: Sequence[str], usual: int | None) -> int | None:
        """A number of tokens, by the first of the names that is given; -1, as with llama.cpp, is as many as fit."""
        name = next((name for name in names if name in self._values), None)
        if name is None:
            return usual
        return None if self._values[name] == -1 else self.whole(name, 1)

    def flag(self, name: str) -> bool:
        """True or false, which it is unless given."""
        value = self._values.get(name, False)
        if not isinstance(value, bool):
            refuse(name, f"{name} {_shown(value)} is neither true nor false; give one of them")
        return value

    def entries(self, name: str) -> Mapping[str, Any]:
        """An object's, empty unless given."""
        value = self._values.get(name, {})
        if not isinstance(value, dict):
            refuse(name, f"{name} {_shown(value)} is no object; give one")
        return value

    def prompt(self, model: Model) -> Sequence[int]:
        """The prompt's ids, be it a text or ids."""
        value = self._values.get("prompt")
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
            (value,) = value
        if isinstance(value, str):
            return self._fitting("prompt", prompt_ids(model.program, value), model)
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            refuse("prompt", f"prompt {_shown(value)} is neither one text nor one list of ids; give one of them")
        return self._fitting("prompt", value, model)

    def conversation(self, model: Model) -> tuple[Sequence[int], tuple[int, ...]]:
        """The messages' ids, and those that end the answer."""
        template, value = model.template, self._values.get("messages")
        if template is None:
            refuse(
                "messages",
                "the file carries no chat template, so messages cannot become a text; start the server with "
                f"--chat-template {', '.join(NAMED)}, or export the file again with it",
            )
        if not isinstance(value, list) or not value:
            refuse("messages", f"messages {_shown(value)} is no list of messages; give at least one")
        messages = [_message(each) for each in value]
        with _blamed_on("messages"):
            ids = template.encode(messages, model.tokenizer)
        stop_ids = template.stop_ids(model.tokenizer, model.metadata.bos_id, model.metadata.stop_ids)
        return self._fitting("messages", ids, model), stop_ids

    def options(self, logprobs: int | None, max_new_tokens: int | None, stop_ids: tuple[int, ...]) -> GenerationOptions:
        """How tokens are chosen, where nothing is asked for as the checkpoint recommends, and when the text ends."""
        given: dict[str, Any] = {"temperature": 1.0, **self._recommended}
        for field in fields(SamplingOptions):
            if field.name in self._values:
                given[field.name] = self._option(field.name)
        for name, value in given.items():
            with _blamed_on(name):
                SamplingOptions(**{name: value})
        return GenerationOptions(SamplingOptions(**given), max_new_tokens, stop_ids, self._stops(), logprobs)

    def order(self, is_chat: bool, prompt: Sequence[int], options: GenerationOptions, model: Model) -> Order:
        """All of it together."""
        vocab_size = model.metadata.config.vocab_size
        for token in options.sampling.logit_bias:
            if token >= vocab_size:
                refuse("logit_bias", f"logit_bias {token} is no token; ids run from 0 to {vocab_size - 1}")
        stream, usage = self.flag("stream"), self.entries("stream_options").get("include_usage", False)
        if "stream_options" in self._values and not stream:
            refuse("stream_options", "stream_options are of no use without stream; add stream: true, or leave them out")
        seed = self.whole("seed")
        with _blamed_on("response_format"):
            grammar = self._grammar()
            constraint = (
                None if grammar is None else Constraint(grammar, model.tokenizer, options.stop_ids, vocab_size, prompt)
            )
        seed = secrets.randbits(64) if seed is None else seed
        return Order(is_chat, prompt, options, constraint, seed, stream, usage is True)

    def _fitting(self, param: str, ids: Sequence[int], model: Model) -> Sequence[int]:
        with _blamed_on(param):
            check_tokens(ids, model.metadata.config.vocab_size)
        capacity = model.metadata.max_seq_len
        if len(ids) > capacity:
            message = f"the {param} has {len(ids)} tokens, and the context only {capacity}; shorten it"
            refuse(param, message, "context_length_exceeded")
        return ids

    def _option(self, name: str) -> float | int | dict[int, float]:
        """A value of SamplingOptions."""
        if name in ("top_k", "penalty_window"):
            return self.whole(name) or 0
        if name == "logit_bias":
            return self._biases()
        number = _number(name, self._values[name])
        return LIKELIEST if name == "top_p" and number == 0 else number

    def _biases(self) -> dict[int, float]:
        given = self.entries("logit_bias")
        if len(given) > MOST_BIASES:
            refuse("logit_bias", f"logit_bias has {len(given)} entries; give at most {MOST_BIASES}")
        for token in given:
            if not token.isdecimal():
                refuse("logit_bias", f"logit_bias {_shown(token)} is no token's id; give a whole number as a string")
        return {int(token): _number("logit_bias", value) for token, value in given.items()}

    def _stops(self) -> tuple[str, ...]:
        value = self._values.get("stop", [])
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            refuse("stop", f"stop {_shown(value)} is no text; give one, or a list of them, none of them empty")
        if len(stops) > MOST_STOPS:
            refuse("stop", f"stop has {len(stops)} texts; give at most {MOST_STOPS}")
        return tuple(stops)

    def _grammar(self) -> str | None:
        """That of the answer's JSON, where it must be some."""
        wanted = self.entries("response_format")
        kind = wanted.get("type", "text")
        if kind == "text":
            return None
        schema: Any = {"type": "object"}
        if kind == "json_schema":
            schema = wanted["json_schema"].get("schema") if isinstance(wanted.get("json_schema"), dict) else None
        elif kind != "json_object":
            refuse(
                "response_format", f"response_format {_shown(kind)} is unknown; give text, json_object or json_schema"
            )
        if not isinstance(schema, dict):
            refuse("response_format", f"response_format has the schema {_shown(schema)}; give an object")
        if find_spec("llguidance") is None:
            refuse(
                "response_format", "the server lacks llguidance for it; run there: pip install 'llama-pte[constrain]'"
            )
        return json_grammar(schema)


def _object(raw: bytes) -> dict[str, Any]:
    """A body's JSON object."""
    try:
        values = json.loads(raw, parse_constant=_no_number)
        json.dumps(values, ensure_ascii=False).encode()  # which half a surrogate pair fails
    except (ValueError, RecursionError) as error:
        refuse(None, f"the body is no JSON ({error}); send an object with Content-Type: application/json")
    if not isinstance(values, dict):
        refuse(None, f"the body is {_shown(values)}; send an object")
    return values


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(name, f"{name} {_shown(value)} is no number; give one")
    try:
        return float(value)
    except OverflowError:
        refuse(name, f"{name} {_shown(value)} is too large; give a smaller number")


def _message(value: Any) -> Message:
    """Reads one message; a content may come as a list of texts."""
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(role, str):
        refuse("messages", f"the message {_shown(value)} has no role; give system, user or assistant")
    content = value.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(_is_text(part) for part in parts):
        refuse("messages", f"the content {_shown(content)} is no text; give only texts")
    return SYSTEM if role == "developer" else role, "".join(part["text"] for part in parts)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
