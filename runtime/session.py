"""Session: one text in the making: its position, its caches, and the two ways to extend it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from export.metadata import Metadata, MethodSpec
from model.errors import InputError
from preproc.positions import PositionInputs
from runtime.kv_cache import KVCache


class Steps(Protocol):
    """What a session needs of a program: `runtime.program.Program`, or an eager model in its place."""

    metadata: Metadata

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once; see `runtime.program.Program.step`."""
        ...


class Session:
    """A mutable position in a text, over an immutable program. Sessions of one program are independent.

    Attributes:
        cache: keys and values of the text so far; without buffers where the program's method takes the whole text.
        hidden: what the last block returned for each token of the latest prefill or decode, normalised, [n, D]
            float32; None before the first and after a failure, and where the program does not return it.
    """

    def __init__(self, program: Steps) -> None:
        metadata = program.metadata
        self._program = program
        self.cache = KVCache(metadata.methods[0], metadata.max_seq_len)
        methods = sorted(metadata.methods, key=lambda method: method.max_length)
        self._bindings = [_Binding(method, metadata, self.cache) for method in methods]
        self.hidden: Tensor | None = None

    @property
    def position(self) -> int:
        """How many tokens the text has."""
        return self.cache.position

    @property
    def capacity(self) -> int:
        """How many tokens it can have."""
        return self.cache.capacity

    def reset(self) -> None:
        """Starts a new text."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Forgets the tokens from `position` on; see `KVCache.rewind`."""
        self.cache.rewind(position)

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
        self.hidden = None
        hidden = list[Tensor]()
        start = 0
        while start < len(tokens):
            binding = self._binding_for(len(tokens) - start)
            chunk = tokens[start : start + binding.method.max_length]
            logits = self._step(binding, chunk, hidden)
            start += len(chunk)
        self.hidden = torch.cat(hidden) if hidden else None
        return logits

    def decode(self, token: int) -> Tensor:
        """Appends one token and returns the logits after it, [V] float32."""
        return self.prefill((token,))

    def _binding_for(self, length: int) -> "_Binding":
        """The shortest method that takes `length` tokens at once, otherwise the longest."""
        fits = (binding for binding in self._bindings if binding.method.max_length >= length)
        return next(fits, self._bindings[-1])

    def _step(self, binding: "_Binding", tokens: Sequence[int], hidden: list[Tensor]) -> Tensor:
        """Runs up to max_length tokens and returns their last one's logits; their hidden states go to `hidden`."""
        rows = binding.place(self.cache.plan(len(tokens)), tokens)
        outputs = self._program.step(binding.method, binding.inputs_of(len(tokens)))
        self.cache.commit(outputs, len(tokens))
        if "hidden" in outputs:
            hidden.append(_copy(outputs["hidden"][0, rows]))
        return _copy(outputs["logits"][0])


def _copy(tensor: Tensor) -> Tensor:
    """By numpy: PyTorch would start threads for it, which then spin for a while where ExecuTorch's are to compute."""
    return torch.from_numpy(tensor.numpy().copy())


class _Binding:
    """A method and its inputs, which are allocated once and written anew for each step.

    With caches, a step's tokens stand at the start of the input `tokens`, and the caches hold those before them.
    Without, `tokens` holds the text so far, and a step's stand behind it.
    """

    def __init__(self, method: MethodSpec, metadata: Metadata, cache: KVCache) -> None:
        length = method.max_length
        self.method = method
        self._cached = bool(cache.buffers)
        self._tokens = torch.zeros((1, length), dtype=torch.int64)
        self._select = torch.zeros((1, length))
        inputs = {"tokens": self._tokens, "select": self._select, **cache.buffers}
        names = [spec.name for spec in method.inputs if spec.name not in inputs]
        self._positions = PositionInputs(metadata.positions, names, length, self._cached)
        self._inputs = {length: inputs | self._positions.tensors}
        self._ids, self._rows = self._tokens.numpy()[0], self._select.numpy()[0]  # which cost less to write

    def inputs_of(self, count: int) -> dict[str, Tensor]:
        """By name, for a step of `count` tokens: the beginnings of the whole inputs where the length is not fixed."""
        whole, length = self._inputs[self.method.max_length], self._length(count)
        if length not in self._inputs:
            dynamic = [spec.name for spec in self.method.inputs if "L" in spec.shape]
            self._inputs[length] = whole | {name: whole[name][:, :length] for name in dynamic}
        return self._inputs[length]

    def _length(self, count: int) -> int:
        """L of a step of `count` tokens."""
        return max(count, self.method.min_length)

    def place(self, position: int, tokens: Sequence[int]) -> slice:
        """Makes the inputs those of `tokens` at `position`, the last of which is selected; zeros pad them.

        Returns:
            their rows in the outputs.
        """
        start = 0 if self._cached else position
        end = start + len(tokens)
        length = self._length(end)
        self._ids[start:end] = tokens
        self._ids[end:length] = 0
        self._rows[:length] = 0
        self._rows[end - 1] = 1
        self._positions.move(position - start, length)
        return slice(start, end)
