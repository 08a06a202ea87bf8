"""Speculative decoding: guesses the next tokens, which the model then checks all in one step.

A guess is only a list of tokens, so the check is exact at any temperature: each token is drawn from the model's own
logits with its own random number, as without a guess. The guess only decides for which tokens the step computes logits
in advance (speculative sampling, https://arxiv.org/abs/2211.17192, with a draft of probability 1 for its tokens).
"""

from typing import Protocol

from model.errors import InputError
from runtime.engine.session import Session, Steps


class Drafter(Protocol):
    """An object that guesses the next tokens of a text."""

    def guess(self, text: list[int], count: int) -> list[int]:
        """Returns at most `count` tokens that may follow the text."""
        ...


class Lookup:
    """A drafter that guesses what followed the latest tokens the last time they occurred in the text.

    This helps with code and quotations, which repeat themselves (prompt lookup,
    https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self, longest: int = 3) -> None:
        """Sets `longest`, the number of latest tokens to search for; if they do not occur, fewer are searched for."""
        self._longest = longest

    def guess(self, text: list[int], count: int) -> list[int]:
        for length in range(min(self._longest, len(text) - 1), 0, -1):
            wanted = text[-length:]
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == wanted:
                    return text[start + length : start + length + count]
        return []


class Draft:
    """A drafter that guesses the likeliest tokens of a smaller model with the same vocabulary."""

    def __init__(self, program: Steps, vocab_size: int) -> None:
        """Starts an empty text in the smaller model.

        Raises:
            InputError: its vocabulary has another size than the model's.
        """
        ours = program.metadata.config.vocab_size
        if ours != vocab_size:
            raise InputError(
                f"the draft model has {ours} ids, but the model has {vocab_size}; give one with the same tokenizer"
            )
        self._session = Session(program)

    def guess(self, text: list[int], count: int) -> list[int]:
        if len(text) + count > self._session.capacity:
            return []
        guessed = [int(self._session.restart(text).numpy().argmax())]
        while len(guessed) < count:
            guessed.append(int(self._session.decode(guessed[-1]).numpy().argmax()))
        return guessed
