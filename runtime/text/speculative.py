"""speculative: guesses at the next tokens, which one step checks all at once.

A guess is a list of tokens and nothing more, so that checking it is exact at any temperature: each token is drawn from
the model's own logits with its own coin, as without a guess, and the guess only says for which tokens the logits are
there already (speculative sampling, https://arxiv.org/abs/2211.17192, with a draft that is certain of its tokens).
"""

from typing import Protocol

from model.errors import InputError
from runtime.engine.session import Session, Steps


class Drafter(Protocol):
    """Something that guesses."""

    def guess(self, text: list[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow the text."""
        ...


class Lookup:
    """What followed the latest tokens the last time they occurred in the text: code and quotations repeat themselves
    (prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self, longest: int = 3) -> None:
        """`longest`: of the latest tokens that are looked for; if they do not occur, fewer are."""
        self._longest = longest

    def guess(self, text: list[int], count: int) -> list[int]:
        for length in range(min(self._longest, len(text) - 1), 0, -1):
            wanted = text[-length:]
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == wanted:
                    return text[start + length : start + length + count]
        return []


class Draft:
    """A smaller model with the same vocabulary: what it holds likeliest."""

    def __init__(self, program: Steps, vocab_size: int) -> None:
        """
        Raises:
            InputError: its vocabulary has another size than the model's.
        """
        ours = program.metadata.config.vocab_size
        if ours != vocab_size:
            raise InputError(f"the draft has {ours} ids where the model has {vocab_size}; give one with its tokenizer")
        self._session = Session(program)

    def guess(self, text: list[int], count: int) -> list[int]:
        if len(text) + count > self._session.capacity:
            return []
        guessed = [int(self._session.restart(text).numpy().argmax())]
        while len(guessed) < count:
            guessed.append(int(self._session.decode(guessed[-1]).numpy().argmax()))
        return guessed
