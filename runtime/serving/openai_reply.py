"""Reply: turns the steps of an answer into OpenAI's JSON, as one object or in chunks."""

import secrets
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from preproc.chat_template import ASSISTANT
from preproc.tokenizer import Tokenizer
from runtime.serving.jobs import Jobs
from runtime.serving.openai_request import CompletionRequest
from runtime.serving.served_model import Model
from runtime.serving.tool_calls import Call, CallReader
from runtime.text.generation import Step


class Reply:
    """The answer to one request.

    Attributes:
        ending: the text that ends a stream.
    """

    ending = "data: [DONE]\n\n"

    def __init__(self, request: CompletionRequest, model: Model, jobs: Jobs) -> None:
        """Starts an empty answer.

        Args:
            jobs: the jobs of the request, whose steps are passed to `take` or `chunks`.
        """
        self._request, self._model, self._jobs = request, model, jobs
        self._id = f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._fingerprint = f"fp_{model.metadata.identity.hex()[:12]}"
        names = _Names(model.tokenizer)
        self._texts = [_Choice(request, number, names) for number in range(len(request.texts))]
        self._ended = 0

    def take(self, number: int, step: Step) -> None:
        """Adds the next step of text `number`."""
        self._texts[number].steps.append(step)

    def whole(self) -> dict[str, Any]:
        """Returns the whole answer as one object."""
        choices = [
            {"index": index, **text.whole(self._jobs.scored(text.prompt))} for index, text in enumerate(self._chosen())
        ]
        kind = "chat.completion" if self._request.is_chat else "text_completion"
        return self._object(kind, choices) | self.tail()

    def head(self) -> dict[str, Any]:
        """Returns what each part of the answer has."""
        return {
            "id": self._id,
            "object": self._chunk_kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._fingerprint,
        }

    def tail(self) -> dict[str, Any]:
        """Returns what follows the choices: the numbers of tokens, their times, and warnings, if any."""
        return {"usage": self._usage(), **self._extras()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yields the first chunks of a stream."""
        if self._request.is_chat:
            for index in range(len(self._texts)):
                yield self._chunk(index, {"delta": {"role": ASSISTANT, "content": ""}})

    def chunks(self, number: int, step: Step) -> Iterator[dict[str, Any]]:
        """Yields the chunks of a step: its text or calls, if any, and the finish reason, if it is the last step."""
        self.take(number, step)
        text = self._texts[number]
        for content, logprobs, finish_reason in text.latest(self._jobs.scored(text.prompt)):
            self._ended += finish_reason is not None
            is_last = self._ended == len(self._texts) and not self._request.include_usage
            timings = {"timings": self._jobs.timings} if self._request.timings_per_token else {}
            extras = self._extras() if is_last else timings
            yield self._chunk(number, content, logprobs, finish_reason) | extras

    def closing(self) -> Iterator[dict[str, Any]]:
        """Yields the last chunks of a stream."""
        if self._request.include_usage:
            yield self._object(self._chunk_kind, []) | self.tail()

    def _chosen(self) -> Iterator["_Choice"]:
        """Yields the texts for the answer: all of each prompt, or those with the highest mean log-probability."""
        request = self._request
        for start in range(0, len(self._texts), request.tries):
            texts = self._texts[start : start + request.tries]
            if request.choices < request.tries:
                texts = sorted(texts, key=_Choice.likelihood, reverse=True)[: request.choices]
            yield from texts

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._request.is_chat else "text_completion"

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._object(self._chunk_kind, [choice])
        return chunk | {"usage": None} if self._request.include_usage else chunk

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.head() | {"object": kind, "choices": choices}

    def _extras(self) -> dict[str, Any]:
        warnings = {"warnings": self._request.warnings} if self._request.warnings else {}
        return {"timings": self._jobs.timings, **warnings}

    def _usage(self) -> dict[str, Any]:
        prompts = sum(map(len, self._request.prompts))
        made = 0 if self._request.is_silent else sum(len(text.steps) for text in self._texts)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": made,
            "total_tokens": prompts + made,
            "prompt_tokens_details": {"cached_tokens": self._jobs.cached},
        }


class _Choice:
    """One text of the answer, and the state of its output.

    Attributes:
        steps: all steps so far.
        prompt: index of its prompt.
    """

    def __init__(self, request: CompletionRequest, number: int, names: "_Names") -> None:
        self._request, self._names = request, names
        self.prompt = request.texts[number].prompt
        self.steps = list[Step]()
        self._length = 0  # characters of the tokens whose logprobs were output
        self._calls = 0
        self._reader = CallReader(request.form, request.names) if request.form else None

    def likelihood(self) -> float:
        """Returns the mean log-probability of the text's tokens."""
        return sum(step.logprob or 0.0 for step in self.steps) / len(self.steps)

    def whole(self, scored: Sequence[Step]) -> dict[str, Any]:
        """Returns the choice object of an answer that is not streamed; `scored` are the prompt's own steps."""
        logprobs = self._logprobs(scored, self.steps)
        if not self._request.is_chat:
            text = self._echo() + "".join(map(self._text, self.steps))
            return {"text": text, "logprobs": logprobs, "finish_reason": self._finish_reason()}
        said = [each for step in self.steps for each in self._read(step)]
        calls = [self._call_json(each) for each in said if isinstance(each, Call)]
        text = "".join(each for each in said if isinstance(each, str))
        message: dict[str, Any] = {"role": ASSISTANT, "content": text if text or not calls else None, "refusal": None}
        message |= {"tool_calls": calls} if calls else {}
        return {"message": message, "logprobs": logprobs, "finish_reason": self._finish_reason()}

    def latest(self, scored: Sequence[Step]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, str | None]]:
        """Yields the chunks of the latest step: content, logprobs and finish reason, the last two possibly None."""
        step, is_chat = self.steps[-1], self._request.is_chat
        if len(self.steps) == 1 and self._request.echoes:
            yield {"text": self._echo()}, self._logprobs(scored, []), None
        logprobs = self._logprobs((), [step])
        said = self._read(step) if is_chat else [text] if (text := self._text(step)) else []
        if not said and logprobs and not step.finish_reason:
            said = [""]
        for each in said:
            content: dict[str, Any] = {"delta": {"content": each}} if is_chat else {"text": each}
            if isinstance(each, Call):
                content = {"delta": {"tool_calls": [{"index": self._calls, **self._call_json(each)}]}}
            yield content, logprobs, None
            logprobs = None
        if step.finish_reason:
            yield {"delta": {}} if is_chat else {"text": ""}, logprobs, self._finish_reason()

    def _text(self, step: Step) -> str:
        return "" if self._request.is_silent else step.text

    def _echo(self) -> str:
        return self._request.echoes[self.prompt] if self._request.echoes else ""

    def _finish_reason(self) -> str | None:
        reason = self.steps[-1].finish_reason
        if self._request.is_silent:
            return "length"
        return "tool_calls" if reason == "stop" and self._calls else reason

    def _read(self, step: Step) -> Sequence[str | Call]:
        """Returns the non-empty texts and the calls that a step makes certain."""
        if self._reader is None:
            return [step.text] if step.text else []
        said = self._reader.add(step.text)
        return said + self._reader.finish() if step.finish_reason else said

    def _call_json(self, call: Call) -> dict[str, Any]:
        assert self._request.form, "without a form no calls are read"
        self._calls += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": self._request.form.new_id(), "type": "function", "function": function}

    def _logprobs(self, scored: Sequence[Step], steps: Sequence[Step]) -> dict[str, Any] | None:
        """Returns the logprobs object for the prompt's steps and for the steps other than stop tokens."""
        if self._request.logprobs is None:
            return None
        made = [] if self._request.is_silent else steps
        listed = [*scored, *(step for step in made if step.token not in self._request.options.stop_ids)]
        if self._request.is_chat:
            return {"content": [self._names.entry(step) for step in listed], "refusal": None} if listed else None
        offsets = list[int]()
        for step in listed:
            offsets.append(self._length)
            self._length += len(step.text)
        return {
            "tokens": [self._names.of(step.token) for step in listed],
            "token_logprobs": [step.logprob for step in listed],
            "top_logprobs": [None if step.logprob is None else self._names.likeliest(step) for step in listed],
            "text_offset": offsets,
        }


class _Names:
    """The names of tokens in OpenAI's logprobs objects."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def of(self, token: int) -> str:
        """Returns a token's text, or its bytes in hexadecimal, as OpenAI does, if it is not valid UTF-8 alone."""
        piece = self._bytes(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def likeliest(self, step: Step) -> dict[str, float]:
        """Returns the likeliest tokens in a step's place: text -> log-probability, the highest if texts are equal."""
        found = dict[str, float]()
        for token, value in step.top_logprobs:
            found.setdefault(self.of(token), value)
        return found

    def entry(self, step: Step) -> dict[str, Any]:
        """Returns the entry of a step in a chat's logprobs."""
        own = self._likely(step.token, step.logprob)
        return own | {"top_logprobs": [self._likely(token, value) for token, value in step.top_logprobs]}

    def _likely(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.of(token), "logprob": logprob, "bytes": list(self._bytes(token))}

    def _bytes(self, token: int) -> bytes:
        return self._specials.get(token) or self._tokenizer.piece(token, first=False)

    @cached_property
    def _specials(self) -> dict[int, bytes]:
        return {token: text.encode() for text, token in self._tokenizer.specials.items()}
