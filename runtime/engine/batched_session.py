"""BatchedSession: several texts, extended together by a program that was exported with that batch size."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from runtime.engine.kv_cache import KVCache
from runtime.engine.session import Binding, Steps, check_prompt


class BatchedSession:
    """Several texts, one in each lane of the program, each at its own position.

    One step appends tokens to any of them, so that weights are read once for all. A lane with fewer tokens than another
    is padded; the results of padding are ignored.

    Attributes:
        caches: the KV cache of each lane.
        texts: the tokens in each cache.
    """

    def __init__(self, program: Steps) -> None:
        metadata, (method,) = program.metadata, program.metadata.methods
        self._program, self._method = program, method
        self._added = [spec.name for spec in method.outputs if spec.is_rows]
        self._cache = KVCache(method, metadata.max_seq_len)
        self.caches = [self._cache.lane(number, metadata.batch_size) for number in range(metadata.batch_size)]
        self.texts = [list[int]() for _ in self.caches]
        self._bindings = [Binding(method, metadata, cache) for cache in self.caches]

    @property
    def chunk(self) -> int:
        """Maximum number of tokens of a text in one step."""
        return self._program.metadata.chunk

    @property
    def capacity(self) -> int:
        """Maximum number of tokens in each text."""
        return self._cache.capacity

    def __len__(self) -> int:
        return len(self.caches)

    def reset(self, lane: int) -> None:
        """Starts a new text in a lane."""
        self.caches[lane].rewind(0)
        self.texts[lane].clear()

    def shorten(self, lane: int, position: int) -> None:
        """Removes a lane's tokens from `position` on, or all; see `KVCache.shorten`."""
        self.caches[lane].shorten(position)
        del self.texts[lane][self.caches[lane].position :]

    def copy(self, source: int, target: int) -> None:
        """Replaces a lane's text by another's."""
        self.caches[target].copy_from(self.caches[source])
        self.texts[target] = list(self.texts[source])

    def is_full(self, lane: int) -> bool:
        """Returns whether a lane's text has the maximum number of tokens."""
        return self.caches[lane].position == self.capacity

    def check(self, prompt: Sequence[int]) -> None:
        """Checks a prompt for an empty lane.

        Raises:
            InputError: the prompt is empty or too long, or a token is not in the vocabulary.
        """
        check_prompt(prompt, self._program.metadata)

    def step(self, texts: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Appends tokens to some of the texts and returns the logits after each text's last token, [V] float32.

        Args:
            texts: lane -> the tokens to append, at least one and at most `chunk`.

        Raises:
            InputError: a lane's tokens are none or do not fit, or one is not in the vocabulary.
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
            self.texts[lane] += tokens
        return {lane: torch.from_numpy(outputs["logits"].numpy()[lane, 0].copy()) for lane in texts}

    def _rows(self, outputs: Mapping[str, Tensor], lane: int) -> dict[str, Tensor]:
        """Returns the new cache rows of one lane."""
        return {name: outputs[name].chunk(len(self))[lane] for name in self._added}


class BatchedText:
    """A single text in the last lane of a batched program, with the interface of a session."""

    def __init__(self, program: Steps) -> None:
        self._session = BatchedSession(program)
        self._number = len(self._session) - 1
        self.capacity = self._session.capacity

    @property
    def cache(self) -> KVCache:
        """The KV cache of the text."""
        return self._session.caches[self._number]

    @property
    def position(self) -> int:
        """Number of tokens in the text."""
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
