"""BatchedSession: several texts in the making, extended together by a program that was exported for so many."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from runtime.engine.kv_cache import KVCache
from runtime.engine.session import Binding, Steps, check_prompt


class BatchedSession:
    """As many texts as the program has room for, each at a position of its own.

    One step takes tokens of any of them: weights are read once for all. A lane with fewer tokens than another is
    padded; what pads it is neither committed nor looked at.
    """

    def __init__(self, program: Steps) -> None:
        metadata, (method,) = program.metadata, program.metadata.methods
        self._program, self._method = program, method
        self._added = [spec.name for spec in method.outputs if spec.is_rows]
        self._cache = KVCache(method, metadata.max_seq_len)
        self.caches = [self._cache.lane(number, metadata.batch_size) for number in range(metadata.batch_size)]
        self._bindings = [Binding(method, metadata, cache) for cache in self.caches]

    @property
    def chunk(self) -> int:
        """How many tokens of a text a step takes."""
        return self._program.metadata.chunk

    @property
    def capacity(self) -> int:
        """How many tokens each text can have."""
        return self._cache.capacity

    def __len__(self) -> int:
        return len(self.caches)

    def reset(self, lane: int) -> None:
        """Starts a new text there."""
        self.caches[lane].rewind(0)

    def is_full(self, lane: int) -> bool:
        """Whether its text can have no more tokens."""
        return self.caches[lane].position == self.capacity

    def check(self, prompt: Sequence[int]) -> None:
        """Raises:
        InputError: an empty lane has no room for it, it is empty, or a token is not in the vocabulary.
        """
        check_prompt(prompt, self._program.metadata)

    def step(self, texts: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Appends tokens to some of the texts, and returns the logits after the last of each, [V] float32.

        Args:
            texts: lane -> the tokens, at most `chunk`.

        Raises:
            InputError: tokens do not fit in a lane, there are none, or one is not in the vocabulary.
        """
        for lane, tokens in texts.items():
            check_prompt(tokens, self._program.metadata, self.caches[lane].position)
        length = max(map(len, texts.values()))
        placed = [
            binding.place(cache.position, texts.get(lane, ()), 1, (), length)[0]
            for lane, (binding, cache) in enumerate(zip(self._bindings, self.caches, strict=True))
        ]
        inputs = dict(self._cache.buffers)
        for name in placed[0].keys() - inputs.keys():
            inputs[name] = torch.from_numpy(np.concatenate([each[name].numpy() for each in placed]))
        outputs = self._program.step(self._method, inputs)
        for lane, tokens in texts.items():
            self.caches[lane].commit(self._rows(outputs, lane), len(tokens))
        return {lane: torch.from_numpy(outputs["logits"].numpy()[lane, 0].copy()) for lane in texts}

    def _rows(self, outputs: Mapping[str, Tensor], lane: int) -> dict[str, Tensor]:
        """New cache rows of one lane."""
        return {name: outputs[name].chunk(len(self))[lane] for name in self._added}


class BatchedText:
    """The last of a program's lanes, to be used like a session where one text is enough."""

    def __init__(self, program: Steps) -> None:
        self._session = BatchedSession(program)
        self._number = len(self._session) - 1
        self.capacity = self._session.capacity

    @property
    def cache(self) -> KVCache:
        """Keys and values of the text so far."""
        return self._session.caches[self._number]

    @property
    def position(self) -> int:
        """How many tokens the text has."""
        return self.cache.position

    def reset(self) -> None:
        """Starts a new text."""
        self._session.reset(self._number)

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Appends a prompt, chunk by chunk, and returns the logits after its last token, [V] float32.

        Raises:
            InputError: as in `BatchedSession.step`.
        """
        chunk = self._session.chunk
        for start in range(0, max(len(tokens), 1), chunk):
            logits = self._session.step({self._number: tokens[start : start + chunk]})[self._number]
        return logits

    def decode(self, token: int) -> Tensor:
        """Appends one token and returns the logits after it, [V] float32."""
        return self.prefill((token,))
