"""A substitute for a session that returns prescribed logits."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from preproc.tokenizer import Tokenizer
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng


class Prescribed:
    """Returns the given logits one after the other, whatever the text is. For `runtime.text.generation.generate`."""

    max_proposed = 1

    def __init__(self, logits: Iterator[Tensor], capacity: int) -> None:
        self.tokens = list[int]()
        self.capacity = capacity
        self._logits = logits

    @property
    def position(self) -> int:
        return len(self.tokens)

    def restart(self, tokens: Sequence[int]) -> Tensor:
        assert len(tokens) <= self.capacity - self.position
        self.tokens += tokens
        return next(self._logits)

    def decode(self, token: int) -> Tensor:
        return self.restart([token])


def steps_of(case: dict[str, Any], tokenizer: Tokenizer) -> list[tuple[int, str, str | None]]:
    """Returns token, text and finish reason of each step for a case of golden/finish.json."""
    stops = {name: tuple(case[name]) for name in ("stop_ids", "stop_strings")}
    options = GenerationOptions(max_new_tokens=case["max_new_tokens"], **stops)
    logits = (one_hot(torch.tensor(token), case["vocab_size"]).float() for token in case["tokens"])
    session = Prescribed(logits, case["capacity"])
    steps = generate(session, case["prompt"], options, Rng(0), tokenizer)
    return [(step.token, step.text, step.finish_reason) for step in steps]
