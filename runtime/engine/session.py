"""Session: one text in the making: its tokens, its caches, and the ways to extend, shorten, copy and keep it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError
from model.kv_row_format import decode, encode
from preproc import rope
from preproc.position_inputs import PositionInputs
from runtime.engine import session_file
from runtime.engine.kv_cache import KVCache, copied
from runtime.pte.metadata import K_CACHE, STREAM, Metadata, MethodSpec, TensorSpec

SINKS = 4
"""Tokens at the start of a text that `Session.slide` keeps, because attention falls back on them (StreamingLLM,
https://arxiv.org/abs/2309.17453, section 3.2).
"""


_NOTHING: tuple[Sequence[int], dict[str, Tensor], Tensor | None] = ((), {}, None)


class Steps(Protocol):
    """What a session needs of a program: `runtime.engine.program.Program`, or an eager model in its place."""

    metadata: Metadata

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once; see `runtime.engine.program.Program.step`."""
        ...


class Session:
    """A mutable position in a text, over an immutable program. Sessions of one program are independent.

    After an error the session stands where the last whole step left it.

    Attributes:
        cache: keys and values of the text so far; without buffers where the program's method takes the whole text.
        tokens: the ids of the text so far; to be read only.
        hidden: what the last block returned for each token of the latest prefill or decode, normalised, [n, D]
            float32; None before the first and after a failure, and where the program does not return it.
    """

    def __init__(self, program: Steps) -> None:
        """Starts an empty text.

        Raises:
            InputError: the program extends several texts at once.
        """
        metadata = program.metadata
        if metadata.batch_size > 1:
            raise InputError(
                f"the file extends {metadata.batch_size} texts at once; use runtime.batch, or export it without "
                "--batch-size"
            )
        self._program = program
        self.cache = KVCache(metadata.methods[0], metadata.max_seq_len)
        methods = sorted(metadata.methods, key=lambda method: method.max_length)
        self._bindings = [Binding(method, metadata, self.cache) for method in methods]
        self.tokens = list[int]()
        self.hidden: Tensor | None = None
        self._proposed = _NOTHING

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
        del self.tokens[position:]

    def shorten(self, position: int) -> None:
        """Forgets the tokens from `position` on, or all where a ring no longer holds what is seen from there."""
        try:
            self.rewind(position)
        except InputError:
            self.reset()

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Appends a prompt, chunk by chunk, and returns the logits after its last token, [V] float32.

        Raises:
            InputError: the prompt is empty, does not fit behind the present position, or holds an id that is none.
        """
        return self.extend(tokens)[0]

    def decode(self, token: int) -> Tensor:
        """Appends one token and returns the logits after it, [V] float32."""
        return self.prefill((token,))

    def extend(self, tokens: Sequence[int], rows: int = 1) -> Tensor:
        """Appends tokens, chunk by chunk, and returns the logits after each of the last `rows` of them, [rows, V].

        Up to `MethodSpec.max_rows` of them come out of one step.

        Raises:
            InputError: as in `prefill`.
        """
        assert 1 <= rows <= max(len(tokens), 1), f"{len(tokens)} tokens have no {rows} rows"
        check_prompt(tokens, self._program.metadata, self.position)
        self.hidden = None
        hidden, logits = list[Tensor](), list[Tensor]()
        start, wanted_from = 0, len(tokens) - rows
        while start < len(tokens):
            binding = self._binding_for(len(tokens) - start)
            end = min(start + binding.method.max_length, len(tokens), max(wanted_from, start) + binding.method.max_rows)
            found = self._step(binding, tokens[start:end], max(end - max(wanted_from, start), 1), hidden)
            if end > wanted_from:
                logits.append(found)
            start = end
        self.hidden = torch.cat(hidden) if hidden else None
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    @property
    def chunk(self) -> int:
        """How many tokens a step takes."""
        return self._program.metadata.chunk

    def pass_on(self, tokens: Sequence[int], stream: Tensor | None = None) -> Tensor:
        """Appends at most `chunk` tokens by one step of a part of a model, as `runtime.pipeline` has it.

        Args:
            stream: [1, L, D], what the part before returned; None where the model begins here.

        Returns:
            [1, L, D], what the part behind takes; where the model ends here, the logits after the last token, [1, V].
        """
        outputs, _ = self._run(self._binding_for(len(tokens)), tokens, 1, stream)
        self._commit(outputs, tokens)
        return copied(outputs[STREAM] if STREAM in outputs else outputs["logits"][0])

    def propose(self, tokens: Sequence[int]) -> Tensor:
        """The logits after each of a few tokens that may come next, at most `max_rows`, [n, V]: of the text as if they
        were appended. `accept` then appends as many of them as are right.

        Raises:
            InputError: as in `prefill`.
        """
        check_tokens(tokens, self._program.metadata.config.vocab_size)
        binding = self._binding_for(len(tokens))
        outputs, span = self._run(binding, tokens, len(tokens))
        rows = {spec.name: copied(outputs[spec.name]) for spec in binding.method.outputs if spec.is_rows}
        self._proposed = tokens, rows, copied(outputs["hidden"][0, span]) if "hidden" in outputs else None
        return copied(outputs["logits"][0])

    def accept(self, count: int) -> None:
        """Appends the first `count` of the tokens just proposed, 1 or more."""
        tokens, rows, hidden = self._proposed
        assert 1 <= count <= len(tokens), f"of {len(tokens)} proposed tokens {count} cannot be accepted"
        self._commit(rows, tokens[:count])
        self.hidden = None if hidden is None else hidden[:count]
        self._proposed = _NOTHING

    @property
    def max_proposed(self) -> int:
        """How many tokens `propose` takes; 1 where guessing does not pay."""
        return max(binding.method.max_rows for binding in self._bindings)

    def restart(self, prompt: Sequence[int]) -> Tensor:
        """Makes the text a prompt, and returns the logits after it, as `prefill` does. Of what the prompt begins with,
        as much as the text began with, too, is not run again.
        """
        self.shorten(common(self.tokens, prompt[:-1]))
        return self.prefill(prompt[self.position :])

    def fork(self) -> "Session":
        """A session of its own that stands where this one does. Only what is filled of the caches is copied: memory
        behind it is not touched before it is used.
        """
        other = Session(self._program)
        for copy, original in zip(other.cache.restore(self.cache.state), self.cache.filled(), strict=True):
            copy[...] = original
        other.tokens = list(self.tokens)
        return other

    def save(self, path: str | Path) -> None:
        """Keeps the session in a file, which is as large as what is filled of the caches; see
        `runtime.engine.session_file`.

        Raises:
            InputError: it cannot be written.
        """
        identity = self._program.metadata.identity
        session_file.write(Path(path), identity, self.cache.state, self.tokens, self.cache.filled())

    def load(self, path: str | Path) -> None:
        """Makes the session what was saved, with this model, in Python or C++.

        Raises:
            InputError: the file is none, damaged, or another model's; the session is then as it was.
        """
        self.tokens = session_file.read(Path(path), self._program.metadata.identity, self.capacity, self.cache.restore)
        self.hidden = None

    def slide(self) -> int:
        """Makes room: forgets the older half of the text, but for its first tokens, and moves the rest to earlier
        positions, as if those had never been. Keys that were rotated for a position are turned back by the difference.

        Returns:
            how many tokens it forgot.

        Raises:
            InputError: positions are learned; or the model sees so much of its context that nothing can be spared.
        """
        config = self._program.metadata.config
        if config.positions == "learned" and self.cache.buffers:
            raise InputError("the model has learned positions, which cached keys cannot change; stop where it is full")
        count = min((self.position - SINKS) // 2, self.cache.room(SINKS))
        if count < 1:
            raise InputError(
                f"of the {self.position} tokens none can be forgotten, because the model sees all but {SINKS} of them; "
                "export with a larger --max-seq-len"
            )

        def moved(spec: TensorSpec, rows: np.ndarray) -> np.ndarray:
            if spec.role != K_CACHE or config.positions != "rope" or spec.layer in config.nope_layers:
                return rows
            metadata, tensor = self._program.metadata, torch.from_numpy(rows)
            keys = rope.earlier(decode(tensor), (metadata.rope_cos, metadata.rope_sin), count)
            return encode(keys, spec.dtype).numpy()

        self.cache.slide(SINKS, count, moved)
        del self.tokens[SINKS : SINKS + count]
        return count

    def _binding_for(self, length: int) -> "Binding":
        """The shortest method that takes `length` tokens at once, otherwise the longest."""
        fits = (binding for binding in self._bindings if binding.method.max_length >= length)
        return next(fits, self._bindings[-1])

    def _step(self, binding: "Binding", tokens: Sequence[int], rows: int, hidden: list[Tensor]) -> Tensor:
        """Runs up to max_length tokens and returns the logits of the last `rows`; hidden states go to `hidden`."""
        outputs, span = self._run(binding, tokens, rows)
        self._commit(outputs, tokens)
        if "hidden" in outputs:
            hidden.append(copied(outputs["hidden"][0, span]))
        return copied(outputs["logits"][0])

    def _run(
        self, binding: "Binding", tokens: Sequence[int], rows: int, stream: Tensor | None = None
    ) -> tuple[dict[str, Tensor], slice]:
        """Runs up to max_length tokens, and returns the outputs and which of their rows are these tokens'."""
        inputs, span = binding.place(self.cache.plan(len(tokens)), tokens, rows, self.tokens)
        return self._program.step(binding.method, inputs if stream is None else {**inputs, STREAM: stream}), span

    def _commit(self, outputs: Mapping[str, Tensor], tokens: Sequence[int]) -> None:
        """Appends the first tokens of a step that was run."""
        self.cache.commit(outputs, len(tokens))
        self.tokens.extend(tokens)


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises:
    InputError: there are none, or one that is not in the vocabulary.
    """
    if not tokens:
        raise InputError("the prompt is empty; give at least one token")
    if unknown := [token for token in tokens if not 0 <= token < vocab_size]:
        raise InputError(f"token {unknown[0]} is not in the vocabulary; ids run from 0 to {vocab_size - 1}")


class TooLongError(InputError):
    """The error of a prompt that does not fit."""


def check_prompt(tokens: Sequence[int], metadata: Metadata, position: int = 0) -> None:
    """Raises:
    InputError: they are empty, or one is not in the vocabulary.
    TooLongError: they do not fit behind `position`.
    """
    check_tokens(tokens, metadata.config.vocab_size)
    free = metadata.max_seq_len - position
    if len(tokens) > free:
        raise TooLongError(
            f"the prompt has {len(tokens)} tokens, but only {free} of {metadata.max_seq_len} positions are free; "
            "shorten it or export with a larger --max-seq-len"
        )


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Binding:
    """A method and its inputs for one text, which are allocated once and written anew for each step.

    With caches, a step's tokens stand at the start of the input `tokens`, and the caches hold those before them.
    Without, `tokens` holds the text so far, and a step's stand behind it.
    """

    def __init__(self, method: MethodSpec, metadata: Metadata, cache: KVCache) -> None:
        length = method.max_length
        self.method = method
        self._cached = bool(cache.buffers)
        self._tokens = torch.zeros((1, length), dtype=torch.int64)
        self._select = torch.zeros(method.max_rows * length)
        inputs = {"tokens": self._tokens, "select": self._select, **cache.buffers}
        others = (spec for spec in method.inputs if spec.name not in inputs and spec.name != STREAM)
        widths = {spec.name: spec.sizes(length)[-1] for spec in others}
        self._positions = PositionInputs(metadata.positions, widths, length)
        self._whole = inputs | self._positions.tensors
        self._inputs = dict[tuple[int, int], tuple[dict[str, Tensor], np.ndarray]]()
        self._ids = self._tokens.numpy()[0]  # which costs less to write

    def _inputs_of(self, length: int, rows: int) -> tuple[dict[str, Tensor], np.ndarray]:
        """By name, for a step: the beginnings of whole inputs where the length is not fixed; and `select`'s rows."""
        if (length, rows) not in self._inputs:
            dynamic = {spec.name for spec in self.method.inputs if "L" in spec.shape} - {"select", STREAM}
            inputs = self._whole | {name: self._whole[name][:, :length] for name in dynamic}
            inputs["select"] = self._select[: rows * length].view(1, rows, length)
            self._inputs[length, rows] = inputs, inputs["select"].numpy()[0]
        return self._inputs[length, rows]

    def place(
        self, position: int, tokens: Sequence[int], rows: int, before: Sequence[int], length: int = 0
    ) -> tuple[dict[str, Tensor], slice]:
        """Makes the inputs those of `tokens` at `position`, the last `rows` of which are selected; zeros pad them.

        Args:
            before: the text so far.
            length: of the step, at least; there may be no tokens then.

        Returns:
            the inputs by name, and the tokens' rows in the outputs.
        """
        start = 0 if self._cached else position
        end = start + len(tokens)
        length = max(end, self.method.min_length, length)
        self._ids[:start] = before[:start]
        self._ids[start:end] = tokens
        self._ids[end:length] = 0
        inputs, select = self._inputs_of(length, rows)
        select[:] = 0
        for row in range(rows):
            select[row, end - rows + row] = 1
        self._positions.move(position - start, length)
        return inputs, slice(start, end)
