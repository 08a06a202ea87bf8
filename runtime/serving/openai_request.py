"""Turns requests in OpenAI's form (https://platform.openai.com/docs/api-reference) into texts to generate."""

import functools
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

from preproc.chat_template import NAMED
from preproc.jinja_template import Carried
from preproc.tokenizer import StreamDecoder, Tokenizer
from runtime.engine.session import TooLongError, check_prompt
from runtime.serving.openai_bodies import MOST_TEXTS, ChatBody, CompletionBody, GenerationBody
from runtime.serving.openai_messages import Message, Tools, read_tools
from runtime.serving.request_body import blamed_on, read_body, refuse, shown
from runtime.serving.served_model import Model
from runtime.serving.tool_calls import Form, call_rules
from runtime.serving.tool_prompt import encode, tool_support
from runtime.text.constraint import Constraint, json_grammar, json_rule, rules
from runtime.text.generation import GenerationOptions, check_ids
from runtime.text.prompts import prompt_ids
from runtime.text.sampler import SamplingOptions

COMPLETION_TOKENS = 16
"""Default maximum number of new tokens of /v1/completions, the same as OpenAI's."""

LIKELIEST = 1e-9
"""The value used for top_p 0: a probability that the likeliest token alone reaches."""


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
        timings_per_token: whether each chunk of a stream has the numbers and times of tokens so far.
        echoes: the prompts as texts, if each answer begins with its prompt; empty otherwise.
        is_silent: whether the answer has only the prompt; one token is generated but not output.
        warnings: a sentence for each thing in the request that was ignored.
        embeds: whether no text but each prompt's vector is wanted.
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
    warnings: Sequence[str] = ()
    embeds: bool = False
    timings_per_token: bool = False

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
    body = read_body(raw, CompletionBody)
    reader = _Reader(model, body)
    given = listed(body.prompt)
    is_silent = body.echo and body.max_tokens == 0
    limit = 1 if is_silent else reader.limit("max_tokens", COMPLETION_TOKENS)
    tries = body.best_of or body.n
    if tries < body.n:
        refuse("best_of", f"best_of {tries} is less than n {body.n}; give at least as many, or leave it out")
    if tries > body.n and body.stream:
        refuse("best_of", f"best_of {tries} is unsupported with stream; leave one of them out")
    logprobs = body.logprobs if tries == body.n else body.logprobs or 0
    options = reader.options(logprobs, limit, model.metadata.stop_ids)
    prompts = [prompt_of(model, "prompt", each) for each in given]
    echoes = [each if isinstance(each, str) else _said(model.tokenizer, each) for each in given] if body.echo else []
    texts = reader.texts(prompts, tries, options, reader.grammar())
    return replace(
        reader.request(False, prompts, texts, options),
        logprobs=body.logprobs,
        echoes=echoes,
        is_silent=is_silent,
    )


def read_chat(raw: bytes, model: Model) -> CompletionRequest:
    """Reads the body of POST /v1/chat/completions.

    Raises:
        RequestError: it cannot be answered.
    """
    return chat_request(read_body(raw, ChatBody), model)


def chat_request(body: ChatBody, model: Model) -> CompletionRequest:
    """Returns the request of a chat.

    Raises:
        RequestError: it cannot be answered.
    """
    reader = _Reader(model, body)
    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    prompt, template = reader.conversation(body.messages, tools)
    if body.top_logprobs and not body.logprobs:
        refuse("top_logprobs", f"top_logprobs {body.top_logprobs} needs logprobs; add logprobs: true")
    logprobs = body.top_logprobs if body.logprobs else None
    limit = reader.limit("max_tokens" if body.max_completion_tokens is None else "max_completion_tokens", None)
    metadata, specials = model.metadata, model.tokenizer.specials
    stop_ids = template.stop_ids(model.tokenizer, metadata.bos_id, metadata.stop_ids)
    form = tool_support(template).form if tools.given else None
    options = reader.options(logprobs, limit, stop_ids, form.shown_ids(specials) if form else ())
    grammar = reader.grammar_with(form, tools) if form else reader.grammar()
    texts = reader.texts([prompt], body.n, options, grammar)
    return replace(reader.request(True, [prompt], texts, options), form=form, names=tools.names)


class _Grammar(NamedTuple):
    """A grammar that the answer must follow, and the parameter that sets it."""

    param: str
    text: str


class _Reader:
    """Turns parameters into what a model needs."""

    def __init__(self, model: Model, body: GenerationBody) -> None:
        self._model, self._body = model, body

    def limit(self, name: str, usual: int | None) -> int | None:
        """Returns the token limit that the parameter `name` sets; -1 is no limit, as with llama.cpp.

        `usual` is the limit if it is not given; None is no limit.
        """
        given: int | None = getattr(self._body, name)
        if given == 0:
            refuse(name, f"{name} 0 is invalid; give 1 or more, or -1 for no limit")
        return usual if given is None else None if given == -1 else given

    def conversation(self, messages: Sequence[Message], tools: Tools) -> tuple[Sequence[int], Carried]:
        """Returns the ids of the messages, and the chat template."""
        template = self._model.template
        if template is None:
            refuse(
                "messages",
                "the file has no chat template, which messages need; start the server with "
                f"--chat-template {', '.join(NAMED)}, or export the file again with it",
            )
        described = [message.described() for message in messages]
        with blamed_on("messages"):
            ids = encode(template, described, tools.given, self._model.tokenizer)
        return _fitting(self._model, "messages", ids), template

    def options(
        self,
        logprobs: int | None,
        max_new_tokens: int | None,
        stop_ids: tuple[int, ...],
        shown_ids: tuple[int, ...] = (),
    ) -> GenerationOptions:
        """Returns the options for choosing tokens and ending a text; defaults are the checkpoint's recommendations."""
        body = self._body
        given: dict[str, Any] = {**self._model.sampling, **self._sampling()}
        for name, value in given.items():
            with blamed_on(name):
                SamplingOptions(**{name: value})
        sampling, vocab_size = SamplingOptions(**given), self._model.metadata.config.vocab_size
        with blamed_on("logit_bias"):
            check_ids(sampling, vocab_size)
        stops = tuple(body.stop) if isinstance(body.stop, list) else (body.stop,) if body.stop else ()
        return GenerationOptions(sampling, max_new_tokens, stop_ids, stops, logprobs, shown_ids=shown_ids)

    def texts(
        self, prompts: Sequence[Sequence[int]], each: int, options: GenerationOptions, grammar: _Grammar | None
    ) -> list[Text]:
        """Returns the texts to generate, `each` for each prompt."""
        if len(prompts) * each > MOST_TEXTS:
            message = f"prompt asks for {len(prompts)} times {each} texts; give at most {MOST_TEXTS} in all"
            refuse("prompt", message)
        model, texts = self._model, list[Text]()
        seed = secrets.randbits(64) if self._body.seed is None else self._body.seed
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

    def request(
        self, is_chat: bool, prompts: Sequence[Sequence[int]], texts: Sequence[Text], options: GenerationOptions
    ) -> CompletionRequest:
        """Returns the request for texts."""
        body, stream_options = self._body, self._body.stream_options
        if stream_options and not body.stream:
            refuse("stream_options", "stream_options needs stream; add stream: true, or leave it out")
        usage = stream_options is not None and stream_options.include_usage
        warnings = body.warnings + self._model.warnings(body.model)
        asked = CompletionRequest(is_chat, prompts, texts, body.n, options, options.logprobs, body.stream, usage)
        return replace(asked, warnings=warnings, timings_per_token=body.timings_per_token)

    def _sampling(self) -> dict[str, Any]:
        """Returns the given values for SamplingOptions."""
        body, capacity = self._body, self._model.metadata.max_seq_len
        given = {each.name: getattr(body, each.name, None) for each in fields(SamplingOptions)}
        given = {name: value for name, value in given.items() if name in body.model_fields_set}
        if given.get("top_k") == -1:  # vLLM's value for all tokens
            given["top_k"] = 0
        if given.get("top_p") == 0:
            given["top_p"] = LIKELIEST
        if given.get("penalty_window") == -1:  # llama.cpp's value for the whole text
            given["penalty_window"] = capacity
        if given.get("penalty_window") == 0:  # llama.cpp's value for no penalties
            given |= {"penalty_window": 1, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        if given.get("dry_multiplier"):
            given["dry_breakers"] = _holding(self._model, tuple(body.dry_sequence_breakers))
            given["dry_window"] = None if body.dry_penalty_last_n == -1 else body.dry_penalty_last_n
        return given | {"logit_bias": {int(token): bias for token, bias in body.logit_bias.items()}}

    def _schema(self) -> dict[str, Any] | None:
        """Returns the JSON schema of an answer that must be JSON, or None."""
        wanted = self._body.response_format
        if wanted.type == "text":
            return None
        _require_grammars("response_format")
        if wanted.type == "json_object":
            return {"type": "object"}
        if wanted.json_schema is None:
            refuse("response_format", 'response_format has no json_schema; add {"name": "...", "schema": {...}}')
        return wanted.json_schema.body


def _require_grammars(param: str) -> None:
    if find_spec("llguidance") is None:
        refuse(param, "the server lacks llguidance; run there: pip install 'llama-pte[constrain]'")


@functools.lru_cache(maxsize=4)
def _holding(model: Model, texts: Sequence[str]) -> frozenset[int]:
    """Returns the tokens that hold one of the texts that end a repetition.

    Raises:
        RequestError: no token holds one of them.
    """
    pieces = [model.tokenizer.piece(token, first=False) for token in range(model.metadata.config.vocab_size)]
    found = set[int]()
    for text in texts:
        holding = {token for token, piece in enumerate(pieces) if text.encode() in piece}
        if not holding:
            refuse("dry_sequence_breakers", f"dry_sequence_breakers {shown(text)} is in no token; give shorter texts")
        found |= holding
    return frozenset(found)


def listed(prompt: str | list[int] | list[str | list[int]]) -> list[Any]:
    """Returns the prompts, each a text or ids, of a parameter that may be one prompt or a list."""
    is_list = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return prompt if is_list else [prompt]  # type: ignore[return-value]


def prompt_of(model: Model, param: str, prompt: str | list[int]) -> Sequence[int]:
    """Returns the ids of a prompt.

    Raises:
        RequestError: it is empty, has unknown ids or does not fit in the context.
    """
    return _fitting(model, param, prompt_ids(model.program, prompt) if isinstance(prompt, str) else prompt)


def _fitting(model: Model, param: str, ids: Sequence[int]) -> Sequence[int]:
    metadata = model.metadata
    with blamed_on(param):
        try:
            check_prompt(ids, metadata)
        except TooLongError:  # whose message is about exporting
            message = f"the {param} has {len(ids)} tokens, but the context only {metadata.max_seq_len}; shorten it"
            refuse(param, message, "context_length_exceeded")
    return ids


def _said(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of a prompt, without an incomplete character at its end."""
    decoder = StreamDecoder(tokenizer)
    return "".join(decoder.add(token) for token in ids)


def _seed(seed: int, index: int) -> int:
    """Returns the seed of text `index`: the request's seed for the first, a hash of seed and index for the others."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest(), "big")
