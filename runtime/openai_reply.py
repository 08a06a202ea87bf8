"""Answers in OpenAI's form: Reply turns steps into JSON, whole or in chunks."""

import secrets
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from preproc.chat import ASSISTANT
from runtime.generation import Step
from runtime.openai_request import Model, Order


class Reply:
    """The answer to one order.

    Attributes:
        cached: how many of the prompt's tokens were not run; to be set before the end.
    """

    def __init__(self, order: Order, model: Model) -> None:
        self._order, self._model = order, model
        self._id = f"{'chatcmpl' if order.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._fingerprint = f"fp_{model.metadata.identity.hex()[:12]}"
        self._steps = 0
        self._length = 0
        self.cached = 0

    def whole(self, steps: Iterable[Step]) -> dict[str, Any]:
        """All steps in one object."""
        steps = list(steps)
        logprobs = self._logprobs(steps)
        self._count(steps)
        text = "".join(step.text for step in steps)
        message = {"role": ASSISTANT, "content": text, "refusal": None}
        content: dict[str, Any] = {"message": message} if self._order.is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": steps[-1].finish_reason}
        kind = "chat.completion" if self._order.is_chat else "text_completion"
        return self._object(kind, [choice]) | {"usage": self._usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        if self._order.is_chat:
            yield self._chunk({"delta": {"role": ASSISTANT, "content": ""}})

    def chunks(self, step: Step) -> Iterator[dict[str, Any]]:
        """What a stream tells of a step: its text, if any, and then that it was the last, if it was."""
        logprobs = self._logprobs([step])
        self._count([step])
        if step.text or (logprobs and not step.finish_reason):
            yield self._chunk(
                {"delta": {"content": step.text}} if self._order.is_chat else {"text": step.text}, logprobs
            )
            logprobs = None
        if step.finish_reason:
            yield self._chunk({"delta": {}} if self._order.is_chat else {"text": ""}, logprobs, step.finish_reason)

    def closing(self) -> Iterator[dict[str, Any]]:
        """What a stream ends with."""
        if self._order.include_usage:
            yield self._object(self._chunk_kind, []) | {"usage": self._usage()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._order.is_chat else "text_completion"

    def _chunk(
        self, content: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._object(self._chunk_kind, [choice])
        return chunk | {"usage": None} if self._order.include_usage else chunk

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        prompt = len(self._order.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._steps,
            "total_tokens": prompt + self._steps,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def _count(self, steps: list[Step]) -> None:
        self._steps += len(steps)
        self._length += sum(len(step.text) for step in steps)

    def _logprobs(self, steps: list[Step]) -> dict[str, Any] | None:
        """Those of the steps whose tokens are part of the text."""
        if self._order.options.logprobs is None:
            return None
        told = [step for step in steps if step.token not in self._order.options.stop_ids]
        if self._order.is_chat:
            return {"content": [self._entry(step) for step in told], "refusal": None} if told else None
        offsets, offset = list[int](), self._length
        for step in told:
            offsets.append(offset)
            offset += len(step.text)
        return {
            "tokens": [self._named(step.token) for step in told],
            "token_logprobs": [step.logprob for step in told],
            "top_logprobs": [{self._named(token): value for token, value in step.top_logprobs} for step in told],
            "text_offset": offsets,
        }

    def _entry(self, step: Step) -> dict[str, Any]:
        own = self._likely(step.token, step.logprob)
        return own | {"top_logprobs": [self._likely(token, value) for token, value in step.top_logprobs]}

    def _likely(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._named(token), "logprob": logprob, "bytes": list(self._bytes(token))}

    def _bytes(self, token: int) -> bytes:
        return self._specials.get(token) or self._model.tokenizer.piece(token, first=False)

    @cached_property
    def _specials(self) -> dict[int, bytes]:
        return {token: text.encode() for text, token in self._model.tokenizer.specials.items()}

    def _named(self, token: int) -> str:
        """A token's text, or what OpenAI writes for one that is no whole text."""
        piece = self._bytes(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
