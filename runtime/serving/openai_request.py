"""Reads and checks requests in OpenAI's form (https://platform.openai.com/docs/api-reference).

Requests may also have the sampler's parameters that OpenAI lacks: top_k, min_p, repetition_penalty, penalty_window.
Unknown parameters are ignored. Known ones that would change the answer but are not supported are refused.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, NamedTuple

from preproc.chat_template import NAMED
from preproc.jinja_template import Carried
from preproc.tokenizer import StreamDecoder, Tokenizer
from runtime.engine.program import Program
from runtime.engine.session import TooLongError, check_prompt
from runtime.pte.metadata import Metadata
from runtime.serving.openai_messages import Tools, read_messages, read_tools
from runtime.serving.request_values import RequestError, Values, blamed_on, number, refuse, shown
from runtime.serving.tool_calls import Form, call_rules
from runtime.serving.tool_prompt import encode, tool_support
from runtime.text.constraint import Constraint, json_grammar, json_rule, rules
from runtime.text.generation import GenerationOptions, check_ids
from runtime.text.prompts import prompt_ids
from runtime.text.sampler import SamplingOptions

COMPLETION_TOKENS = 16
"""Default maximum number of new tokens of /v1/completions, the same as OpenAI's."""

MOST_STOPS, MOST_BIASES, MOST_LOGPROBS, MOST_CHOICES, MOST_TEXTS = 16, 1024, 20, 16, 256

LIKELIEST = 1e-9
"""The value used for top_p 0: a probability that the likeliest token alone reaches."""

_HARMLESS: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
}
"""Unsupported parameter -> its values that have no effect and are accepted; null is accepted, too."""

_ONLY_TEXTS: dict[str, tuple[Any, ...]] = {"tools": ([],)}
_ONLY_MESSAGES: dict[str, tuple[Any, ...]] = {"echo": (False,), "best_of": (0, 1)}
"""Further unsupported parameters of only one of the endpoints."""


@dataclass(frozen=True)
class Model:
    """The served model.

    Attributes:
        name: its name in requests.
        created: modification time of the file, in seconds since 1970.
        program, tokenizer: the opened file and its tokenizer.
        template: the chat template; None if there is none.
    """

    name: str
    created: int
    program: Program
    tokenizer: Tokenizer
    template: Carried | None

    @property
    def metadata(self) -> Metadata:
        """The contents of the file other than graph and weights."""
        return self.program.metadata


@dataclass(frozen=True)
class Text:
    """One text to generate.

    Attributes:
        prompt: index of its prompt in the request.
        seed: seed of its random numbers.
        constraint: see `runtime.text.generation.generate`.
    """

    prompt: int
    seed: int
    constraint: Constraint | None


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request.

    Attributes:
        is_chat: whether the answer is a chat message rather than a text.
        prompts: the ids of each prompt; they fit in the context.
        texts: the texts to generate, the same number for each prompt, in the prompts' order.
        choices: number of each prompt's texts in the answer; if fewer than generated, the likeliest.
        options: see `runtime.text.generation.generate`.
        logprobs: number of likeliest tokens whose probability the answer reports; None for no probabilities at all.
        stream: whether the answer is streamed.
        include_usage: whether a stream ends with the numbers of tokens.
        echoes: the prompts as texts, if each answer begins with its prompt; empty otherwise.
        is_silent: whether the answer has only the prompt; one token is generated but not output.
        form, names: how calls of functions are written, and the functions' names; None and empty without functions.
    """

    is_chat: bool
    prompts: Sequence[Sequence[int]]
    texts: Sequence[Text]
    choices: int
    options: GenerationOptions
    logprobs: int | None
    stream: bool
    include_usage: bool
    echoes: Sequence[str] = ()
    is_silent: bool = False
    form: Form | None = None
    names: Sequence[str] = ()

    @property
    def tries(self) -> int:
        """Number of texts to generate for each prompt."""
        return len(self.texts) // len(self.prompts)

    @property
    def scores_prompts(self) -> bool:
        """Whether the answer reports probabilities of the prompts' own tokens."""
        return bool(self.echoes) and self.logprobs is not None


def read_completion(raw: bytes, model: Model) -> CompletionRequest:
    """Reads the body of POST /v1/completions.

    Raises:
        RequestError: it cannot be answered.
    """
    values = _Request(raw, model, _ONLY_TEXTS)
    given = values.prompts()
    echo = values.flag("echo")
    logprobs = values.whole("logprobs", 0, MOST_LOGPROBS)
    is_silent = echo and values.get("max_tokens") == 0 and values.whole("max_tokens") == 0
    limit = 1 if is_silent else values.limit(("max_tokens",), COMPLETION_TOKENS)
    choices = values.whole("n", 1, MOST_CHOICES) or 1
    tries = values.tries(choices)
    options = values.options(logprobs if tries == choices else logprobs or 0, limit, model.metadata.stop_ids)
    prompts = [values.ids(each) for each in given]
    echoes = [each if isinstance(each, str) else _said(model.tokenizer, each) for each in given] if echo else []
    texts = values.texts(prompts, tries, options, values.grammar())
    return CompletionRequest(False, prompts, texts, choices, options, logprobs, *values.streaming(), echoes, is_silent)


def read_chat(raw: bytes, model: Model) -> CompletionRequest:
    """Reads the body of POST /v1/chat/completions.

    Raises:
        RequestError: it cannot be answered.
    """
    values = _Request(raw, model, _ONLY_MESSAGES)
    tools = read_tools(values)
    prompt, template = values.conversation(tools)
    top = values.whole("top_logprobs", 0, MOST_LOGPROBS)
    logprobs = (top or 0) if values.flag("logprobs") else None
    if top and logprobs is None:
        refuse("top_logprobs", f"top_logprobs {top} needs logprobs; add logprobs: true")
    limit = values.limit(("max_completion_tokens", "max_tokens"), None)
    metadata, specials = model.metadata, model.tokenizer.specials
    stop_ids = template.stop_ids(model.tokenizer, metadata.bos_id, metadata.stop_ids)
    form = tool_support(template).form if tools.given else None
    options = values.options(logprobs, limit, stop_ids, form.shown_ids(specials) if form else ())
    choices = values.whole("n", 1, MOST_CHOICES) or 1
    grammar = values.grammar_with(form, tools) if form else values.grammar()
    texts = values.texts([prompt], choices, options, grammar)
    streaming = values.streaming()
    return CompletionRequest(
        True, [prompt], texts, choices, options, logprobs, *streaming, form=form, names=tools.names
    )


class _Grammar(NamedTuple):
    """A grammar that the answer must follow, and the parameter that sets it."""

    param: str
    text: str


class _Request(Values):
    """The values of a request's body, checked for a model."""

    def __init__(self, raw: bytes, model: Model, harmless: Mapping[str, tuple[Any, ...]]) -> None:
        super().__init__(raw)
        self._model = model
        name = self.get("model", model.name)
        if name != model.name:
            message = f"the model {shown(name)} is not served; give {shown(model.name)}, or leave it out"
            raise RequestError(404, message, "model", "model_not_found")
        for param, values in {**_HARMLESS, **harmless}.items():
            is_idle = param == "tools" and self.get("tool_choice") == "none"
            if param in self and self.get(param) not in values and not is_idle:
                fix = f"give {shown(values[0])}" if values else "leave it out"
                refuse(param, f"{param} {shown(self.get(param))} is unsupported; {fix}", "unsupported_value")

    def limit(self, names: Sequence[str], usual: int | None) -> int | None:
        """Returns the token limit from the first given parameter of `names`; -1 is no limit, as with llama.cpp.

        `usual` is the limit if none is given; None is no limit.
        """
        name = next((name for name in names if name in self), None)
        if name is None:
            return usual
        return None if self.get(name) == -1 else self.whole(name, 1)

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts, each a text or ids."""
        value = self.get("prompt")
        is_list = isinstance(value, list) and bool(value) and all(isinstance(each, str | list) for each in value)
        given = value if is_list else [value]
        for each in given:
            if not isinstance(each, str) and not _are_ids(each):
                message = f"prompt {shown(each)} is invalid; give a text or a list of token ids, or a list of these"
                refuse("prompt", message)
        return given

    def ids(self, prompt: str | list[int]) -> Sequence[int]:
        """Returns the ids of a prompt, which must fit in the context."""
        return self._fitting("prompt", prompt_ids(self._model.program, prompt) if isinstance(prompt, str) else prompt)

    def tries(self, choices: int) -> int:
        """Number of texts to generate for each prompt."""
        best_of = self.whole("best_of", 0, MOST_CHOICES) or choices
        if best_of < choices:
            refuse("best_of", f"best_of {best_of} is less than n {choices}; give at least as many, or leave it out")
        if best_of > choices and self.flag("stream"):
            refuse("best_of", f"best_of {best_of} is unsupported with stream; leave one of them out")
        return best_of

    def conversation(self, tools: Tools) -> tuple[Sequence[int], Carried]:
        """Returns the ids of the messages, and the chat template."""
        template = self._model.template
        if template is None:
            refuse(
                "messages",
                "the file has no chat template, which messages need; start the server with "
                f"--chat-template {', '.join(NAMED)}, or export the file again with it",
            )
        messages = read_messages(self)
        with blamed_on("messages"):
            ids = encode(template, messages, tools.given, self._model.tokenizer)
        return self._fitting("messages", ids), template

    def options(
        self,
        logprobs: int | None,
        max_new_tokens: int | None,
        stop_ids: tuple[int, ...],
        shown_ids: tuple[int, ...] = (),
    ) -> GenerationOptions:
        """Returns the options for choosing tokens and ending a text; defaults are the checkpoint's recommendations."""
        given: dict[str, Any] = {"temperature": 1.0, **self._model.metadata.sampling}
        for field in fields(SamplingOptions):
            if field.name in self:
                given[field.name] = self._option(field.name)
        for name, value in given.items():
            with blamed_on(name):
                SamplingOptions(**{name: value})
        sampling, vocab_size = SamplingOptions(**given), self._model.metadata.config.vocab_size
        with blamed_on("logit_bias"):
            check_ids(sampling, vocab_size)
        return GenerationOptions(sampling, max_new_tokens, stop_ids, self._stops(), logprobs, shown_ids=shown_ids)

    def texts(
        self, prompts: Sequence[Sequence[int]], each: int, options: GenerationOptions, grammar: _Grammar | None
    ) -> list[Text]:
        """Returns the texts to generate, `each` for each prompt."""
        if len(prompts) * each > MOST_TEXTS:
            message = f"prompt asks for {len(prompts)} times {each} texts; give at most {MOST_TEXTS} in all"
            refuse("prompt", message)
        model, seed, texts = self._model, self.whole("seed"), list[Text]()
        seed = secrets.randbits(64) if seed is None else seed
        vocab_size = model.metadata.config.vocab_size
        for i in range(len(prompts) * each):
            constraint = None
            if grammar is not None:
                with blamed_on(grammar.param):
                    prompt = prompts[i // each]
                    constraint = Constraint(grammar.text, model.tokenizer, options.stop_ids, vocab_size, prompt)
            texts.append(Text(i // each, _seed(seed, i), constraint))
        return texts

    def grammar(self) -> _Grammar | None:
        """Returns the grammar of an answer that must be JSON, or None."""
        schema = self._schema()
        return None if schema is None else _Grammar("response_format", json_grammar(schema))

    def grammar_with(self, form: Form, tools: Tools) -> _Grammar | None:
        """Returns the grammar of an answer that must call a function or, if it must be JSON, may call one; or None."""
        schema = None if tools.required else self._schema()
        if schema is None and not tools.required:
            return None
        if tools.required:
            _require_grammars("tool_choice")
        functions = [tool["function"] for tool in tools.required or tools.given]
        calls = call_rules(form, functions, tools.several, self._model.tokenizer.specials)
        if schema is None:
            return _Grammar("tools", rules(f"start: calls\n{calls}"))
        return _Grammar("response_format", rules(f"start: calls | json\njson: {json_rule(schema)}\n{calls}"))

    def streaming(self) -> tuple[bool, bool]:
        """Returns whether the answer is streamed, and whether a stream ends with the numbers of tokens."""
        stream, usage = self.flag("stream"), self.entries("stream_options").get("include_usage", False)
        if "stream_options" in self and not stream:
            refuse("stream_options", "stream_options needs stream; add stream: true, or leave it out")
        return stream, usage is True

    def _fitting(self, param: str, ids: Sequence[int]) -> Sequence[int]:
        metadata = self._model.metadata
        with blamed_on(param):
            try:
                check_prompt(ids, metadata)
            except TooLongError:  # whose message is about exporting
                message = f"the {param} has {len(ids)} tokens, but the context only {metadata.max_seq_len}; shorten it"
                refuse(param, message, "context_length_exceeded")
        return ids

    def _option(self, name: str) -> float | int | dict[int, float]:
        """Returns a value for SamplingOptions."""
        if name == "top_k" and self.get(name) == -1:  # vLLM's value for all tokens
            return 0
        if name in ("top_k", "penalty_window"):
            return self.whole(name) or 0
        if name == "logit_bias":
            return self._biases()
        value = number(name, self.get(name))
        return LIKELIEST if name == "top_p" and value == 0 else value

    def _biases(self) -> dict[int, float]:
        given = self.entries("logit_bias")
        if len(given) > MOST_BIASES:
            refuse("logit_bias", f"logit_bias has {len(given)} entries; give at most {MOST_BIASES}")
        for token in given:
            if not token.isdecimal():
                refuse("logit_bias", f"logit_bias {shown(token)} is invalid; give a token id as a string")
        return {int(token): number("logit_bias", value) for token, value in given.items()}

    def _stops(self) -> tuple[str, ...]:
        value = self.get("stop", "")
        stops = [value][: len(value)] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            refuse("stop", f"stop {shown(value)} is invalid; give a text or a list of texts, none of them empty")
        if len(stops) > MOST_STOPS:
            refuse("stop", f"stop has {len(stops)} texts; give at most {MOST_STOPS}")
        return tuple(stops)

    def _schema(self) -> dict[str, Any] | None:
        """Returns the JSON schema of an answer that must be JSON, or None."""
        wanted = self.entries("response_format")
        kind = wanted.get("type", "text")
        if kind == "text":
            return None
        schema: Any = {"type": "object"}
        if kind == "json_schema":
            schema = wanted["json_schema"].get("schema") if isinstance(wanted.get("json_schema"), dict) else None
        elif kind != "json_object":
            refuse(
                "response_format", f"response_format {shown(kind)} is unknown; give text, json_object or json_schema"
            )
        if not isinstance(schema, dict):
            refuse("response_format", f"the schema {shown(schema)} of response_format is invalid; give an object")
        _require_grammars("response_format")
        return schema


def _require_grammars(param: str) -> None:
    if find_spec("llguidance") is None:
        refuse(param, "the server lacks llguidance; run there: pip install 'llama-pte[constrain]'")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(i, bool) or not isinstance(i, int) for i in value)


def _said(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of a prompt, without an incomplete character at its end."""
    decoder = StreamDecoder(tokenizer)
    return "".join(decoder.add(token) for token in ids)


def _seed(seed: int, index: int) -> int:
    """Returns the seed of text `index`: the request's seed for the first, a hash of seed and index for the others."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "big")
