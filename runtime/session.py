"""Session: one text in the making: its position, its caches, and the two ways to extend it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from export.metadata import Metadata, MethodSpec
from model.errors import InputError
from runtime.kv_cache import KVCache


class Steps(Protocol):
    """What a session needs of a program: `runtime.program.Program`, or an eager model in its place."""

    metadata: Metadata

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once; see `runtime.program.Program.step`."""
        ...


class Session:
    """A mutable position in a text, over an immutable program. Sessions of one program are independent."""

    def __init__(self, program: Steps) -> None:
        self._program = program
        self._methods = sorted(program.metadata.methods, key=lambda method: method.max_length)
        self._positions = program.metadata.positions
        self._text = list[int]()  # of a model without caches, which takes it whole at every step
        self.cache = KVCache(self._methods[0], program.metadata.max_seq_len)

    @property
    def position(self) -> int:
        """How many tokens the caches hold."""
        return self.cache.position

    @property
    def capacity(self) -> int:
        """How many tokens the caches can hold."""
        return self.cache.capacity

    def reset(self) -> None:
        """Starts a new text."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Forgets the tokens from `position` on; see `KVCache.rewind`."""
        self.cache.rewind(position)
        del self._text[position:]

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Appends a prompt, chunk by chunk, and returns the logits after its last token, [V] float32.

        Raises:
            InputError: the prompt is empty, does not fit behind the present position, or holds an id that is none.
        """
        if not tokens:
            raise InputError("the prompt is empty; give at least one token")
        vocab_size = self._program.metadata.config.vocab_size
        if unknown := [token for token in tokens if not 0 <= token < vocab_size]:
            raise InputError(f"token {unknown[0]} is not in the vocabulary; ids run from 0 to {vocab_size - 1}")
        if len(tokens) > self.capacity - self.position:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, but only {self.capacity - self.position} of {self.capacity} "
                "positions are free; shorten it or export with a larger --max-seq-len"
            )
        if not self.cache.buffers:
            return self._whole_text(tokens)
        start = 0
        while start < len(tokens):
            method = self._method_for(len(tokens) - start)
            chunk = tokens[start : start + method.max_length]
            logits = self._step(method, chunk)
            start += len(chunk)
        return logits

    def decode(self, token: int) -> Tensor:
        """Appends one token and returns the logits after it, [V] float32."""
        return self.prefill((token,))

    def _method_for(self, length: int) -> MethodSpec:
        """The shortest method that takes `length` tokens at once, otherwise the longest."""
        return next((method for method in self._methods if method.max_length >= length), self._methods[-1])

    def _whole_text(self, tokens: Sequence[int]) -> Tensor:
        position = self.position
        text = [*self._text, *tokens]
        self.cache.rewind(0)
        try:
            logits = self._step(self._methods[-1], text)
        except BaseException:
            self.cache.position = position
            raise
        self._text = text
        return logits

    def _step(self, method: MethodSpec, tokens: Sequence[int]) -> Tensor:
        """Runs up to max_length tokens; what pads them to the method's length is neither committed nor selected."""
        valid, length = len(tokens), max(len(tokens), method.min_length)
        position = self.cache.plan(valid)
        padded = torch.zeros((1, length), dtype=torch.int64)
        padded[0, :valid] = torch.tensor(tokens)
        select = torch.zeros((1, length))
        select[0, valid - 1] = 1
        inputs = {"tokens": padded, "select": select, **self.cache.buffers}
        for spec in method.inputs:
            if spec.name not in inputs:
                inputs[spec.name] = self._positions.make(spec.name, position, length, int(spec.shape[-1]) - length)
        outputs = self._program.step(method, inputs)
        self.cache.commit(outputs, valid)
        return outputs["logits"][0].clone()
