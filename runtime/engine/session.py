"""Session: one text, with its tokens and caches, which can be extended, shortened, copied and saved."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError
from model.kv_row_format import decode, encode
from model.rotary import block_angles
from preproc import rope
from preproc.position_inputs import PositionInputs
from runtime.engine import session_file
from runtime.engine.kv_cache import KVCache, copied
from runtime.pte.metadata import K_CACHE, STREAM, Metadata, MethodSpec, TensorSpec

SINKS = 4
"""Number of tokens at the start of a text that `Session.slide` keeps, because much attention goes to them
(StreamingLLM, https://arxiv.org/abs/2309.17453, section 3.2).
"""


_NOTHING: tuple[Sequence[int], dict[str, Tensor], Tensor | None] = ((), {}, None)


class Steps(Protocol):
    """The part of a program that a session uses; `runtime.engine.program.Program` or an eager model implements it."""

    metadata: Metadata

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once; see `runtime.engine.program.Program.step`."""
        ...


class Session:
    """A text that is extended by an immutable program. Sessions of one program are independent.

    After an error the session is in the state after the last complete step.

    Attributes:
        cache: the keys and values of the text; without buffers if the program's method takes the whole text.
        tokens: the ids of the text; read-only.
        hidden: the last block's output for each token of the latest prefill or decode, normalised, [n, D] float32;
            None before the first, after a failure, and if the program does not return it.
    """

    def __init__(self, program: Steps) -> None:
        """Starts an empty text.

        Raises:
            InputError: the program was exported for several texts at once.
        """
        metadata = program.metadata
        if metadata.batch_size > 1:
            raise InputError(
                f"the file was exported for {metadata.batch_size} texts at once; use `llama-pte batch`, or export it "
                "without --batch-size"
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
        """Number of tokens in the text."""
        return self.cache.position

    @property
    def capacity(self) -> int:
        """Maximum number of tokens in the text."""
        return self.cache.capacity

    def reset(self) -> None:
        """Starts a new text."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Removes the tokens from `position` on; see `KVCache.rewind`."""
        self.cache.rewind(position)
        del self.tokens[position:]

    def shorten(self, position: int) -> None:
        """Removes the tokens from `position` on, or all; see `KVCache.shorten`."""
        self.cache.shorten(position)
        del self.tokens[self.position :]

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Appends a prompt, chunk by chunk, and returns the logits after its last token, [V] float32.

        Raises:
            InputError: the prompt is empty or does not fit after the present position, or has an unknown id.
        """
        return self.extend(tokens)[0]

    def decode(self, token: int) -> Tensor:
        """Appends one token and returns the logits after it, [V] float32."""
        return self.prefill((token,))

    def extend(self, tokens: Sequence[int], rows: int = 1) -> Tensor:
        """Appends tokens, chunk by chunk, and returns the logits after each of the last `rows` of them, [rows, V].

        One step returns at most `MethodSpec.max_rows` of them.

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
        """Maximum number of tokens in one step."""
        return self._program.metadata.chunk

    def pass_on(self, tokens: Sequence[int], stream: Tensor | None = None) -> Tensor:
        """Appends at most `chunk` tokens by one step of a part of a model; see `runtime.pipeline`.

        Args:
            stream: the output of the preceding part, [1, L, D]; None for the first part.

        Returns:
            the input of the following part, [1, L, D]; for the last part, the logits after the last token, [1, V].
        """
        outputs, _ = self._run(self._binding_for(len(tokens)), tokens, 1, stream)
        self._commit(outputs, tokens)
        return copied(outputs[STREAM] if STREAM in outputs else outputs["logits"][0])

    def propose(self, tokens: Sequence[int]) -> Tensor:
        """Returns the logits after each of some guessed next tokens, [n, V], without appending the tokens.

        `accept` then appends as many of the tokens as are correct. At most `max_proposed` tokens may be proposed.

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
        """Appends the first `count` of the tokens of the latest `propose`, at least 1."""
        tokens, rows, hidden = self._proposed
        assert 1 <= count <= len(tokens), f"of {len(tokens)} proposed tokens {count} cannot be accepted"
        self._commit(rows, tokens[:count])
        self.hidden = None if hidden is None else hidden[:count]
        self._proposed = _NOTHING

    @property
    def max_proposed(self) -> int:
        """Maximum number of tokens for `propose`; 1 if the program cannot check guesses."""
        return max(binding.method.max_rows for binding in self._bindings)

    def restart(self, prompt: Sequence[int]) -> Tensor:
        """Replaces the text by a prompt and returns the logits after it, as `prefill` does.

        The beginning that text and prompt have in common is not run again.
        """
        self.shorten(common(self.tokens, prompt[:-1]))
        return self.prefill(prompt[self.position :])

    def begin(self, prompt: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Replaces the text by all of a prompt but its last step, which `restart` then runs.

        So a caller can show the progress of a long prompt, do something else in between, or stop.

        Yields:
            after each step, the number of tokens in the text, and in the prompt.

        Raises:
            InputError: as in `prefill`.
        """
        self.shorten(common(self.tokens, prompt[:-1]))
        check_prompt(prompt[self.position :], self._program.metadata, self.position)
        while len(prompt) - self.position > self.chunk:
            self.prefill(prompt[self.position : self.position + self.chunk])
            yield self.position, len(prompt)

    def fork(self) -> "Session":
        """Returns an independent session with the same text; see `KVCache.copy_from`."""
        other = Session(self._program)
        other.cache.copy_from(self.cache)
        other.tokens = list(self.tokens)
        return other

    def save(self, path: str | Path) -> None:
        """Saves the session to a file as large as the filled part of the caches; see `runtime.engine.session_file`.

        Raises:
            InputError: the file cannot be written.
        """
        identity = self._program.metadata.identity
        session_file.write(Path(path), identity, self.cache.state, self.tokens, self.cache.filled())

    def load(self, path: str | Path) -> None:
        """Restores a session that was saved with this model, by Python or C++.

        Raises:
            InputError: the file is no saved session, is damaged, or is for another model; the session is unchanged.
        """
        self.tokens = session_file.read(Path(path), self._program.metadata.identity, self.capacity, self.cache.restore)
        self.hidden = None

    def slide(self) -> int:
        """Makes room: removes the older half of the text, except the first SINKS tokens.

        The later tokens move to earlier positions; keys with rotary embedding are rotated back by the difference.

        Returns:
            the number of removed tokens.

        Raises:
            InputError: positions are learned, or the window covers so much of the context that none can be removed.
        """
        metadata, config = self._program.metadata, self._program.metadata.config
        if config.positions == "learned" and self.cache.buffers:
            raise InputError("sliding is unsupported for a model with learned positions; stop when the context is full")
        count = min((self.position - SINKS) // 2, self.cache.room(SINKS))
        if count < 1:
            raise InputError(
                f"none of the {self.position} tokens can be forgotten, because the model sees all but {SINKS} of them; "
                "export with a larger --max-seq-len"
            )

        def moved(spec: TensorSpec, rows: np.ndarray) -> np.ndarray:
            first_pair = None if spec.layer is None else config.first_pair(spec.layer)
            tables = block_angles((metadata.rope_cos, metadata.rope_sin), first_pair, config.rotated // 2)
            if spec.role != K_CACHE or tables is None:
                return rows
            keys = rope.earlier(decode(torch.from_numpy(rows)), tables, count)
            return encode(keys, spec.dtype).numpy()

        self.cache.slide(SINKS, count, moved)
        del self.tokens[SINKS : SINKS + count]
        return count

    def _binding_for(self, length: int) -> "Binding":
        """Returns the binding of the shortest method that takes `length` tokens at once, or else of the longest."""
        fits = (binding for binding in self._bindings if binding.method.max_length >= length)
        return next(fits, self._bindings[-1])

    def _step(self, binding: "Binding", tokens: Sequence[int], rows: int, hidden: list[Tensor]) -> Tensor:
        """Appends up to max_length tokens and returns the logits of the last `rows`; adds hidden states to `hidden`."""
        outputs, span = self._run(binding, tokens, rows)
        self._commit(outputs, tokens)
        if "hidden" in outputs:
            hidden.append(copied(outputs["hidden"][0, span]))
        return copied(outputs["logits"][0])

    def _run(
        self, binding: "Binding", tokens: Sequence[int], rows: int, stream: Tensor | None = None
    ) -> tuple[dict[str, Tensor], slice]:
        """Runs up to max_length tokens; returns the outputs, and the range of their rows that are for these tokens."""
        inputs, span = binding.place(self.cache.plan(len(tokens)), tokens, rows, self.tokens)
        return self._program.step(binding.method, inputs if stream is None else {**inputs, STREAM: stream}), span

    def _commit(self, outputs: Mapping[str, Tensor], tokens: Sequence[int]) -> None:
        """Appends tokens, the first ones of a step, and their cache rows."""
        self.cache.commit(outputs, len(tokens))
        self.tokens.extend(tokens)


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Checks the ids of a prompt.

    Raises:
        InputError: there are none, or one is not in the vocabulary.
    """
    if not tokens:
        raise InputError("the prompt is empty; give at least one token")
    if unknown := [token for token in tokens if not 0 <= token < vocab_size]:
        raise InputError(f"token {unknown[0]} is not in the vocabulary; give ids from 0 to {vocab_size - 1}")


class TooLongError(InputError):
    """Raised if a prompt does not fit in the context."""


def check_prompt(tokens: Sequence[int], metadata: Metadata, position: int = 0) -> None:
    """Checks the ids and the length of a prompt.

    Raises:
        InputError: there are no tokens, or one is not in the vocabulary.
        TooLongError: they do not fit after `position` tokens.
    """
    check_tokens(tokens, metadata.config.vocab_size)
    free = metadata.max_seq_len - position
    if len(tokens) > free:
        raise TooLongError(
            f"the prompt has {len(tokens)} tokens, but only {free} of {metadata.max_seq_len} positions are free; "
            "shorten it or export with a larger --max-seq-len"
        )


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the common beginning of two texts, in tokens."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Binding:
    """A method and its inputs for one text, which are allocated once and overwritten for each step.

    With caches, the input `tokens` has only the step's tokens; the caches have the earlier ones. Without caches,
    `tokens` has the text so far, followed by the step's tokens.
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
        self._ids = self._tokens.numpy()[0]  # faster to write to than the tensor

    def _inputs_of(self, length: int, rows: int) -> tuple[dict[str, Tensor], np.ndarray]:
        """Returns a step's inputs by name, cut to `length` where the length is not fixed, and the rows of `select`."""
        if (length, rows) not in self._inputs:
            dynamic = {spec.name for spec in self.method.inputs if "L" in spec.shape} - {"select", STREAM}
            inputs = self._whole | {name: self._whole[name][:, :length] for name in dynamic}
            inputs["select"] = self._select[: rows * length].view(1, rows, length)
            self._inputs[length, rows] = inputs, inputs["select"].numpy()[0]
        return self._inputs[length, rows]

    def place(
        self, position: int, tokens: Sequence[int], rows: int, before: Sequence[int], length: int = 0
    ) -> tuple[dict[str, Tensor], slice]:
        """Writes the inputs for `tokens` at `position`, padded with zeros; logits are for the last `rows` tokens.

        Args:
            before: the text so far.
            length: minimum length of the step; with it, `tokens` may be empty.

        Returns:
            the inputs by name, and the range of the tokens' rows in the outputs.
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
