"""Generates a text, one step at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from model.errors import InputError
from preproc.tokenizer import StreamDecoder, Tokenizer
from runtime.engine.session import Session
from runtime.text.constraint import Constraint
from runtime.text.sampler import Mirostat, Rng, SamplingOptions, logprobs, sample
from runtime.text.speculative import Drafter


@dataclass(frozen=True)
class Step:
    """One generated token.

    Attributes:
        token: its id.
        text: the text that it completes; empty while a UTF-8 character is incomplete or a stop string may have begun.
            A stop token has no text of its own, only the text held back before it.
        finish_reason: "stop" after a stop token or a stop string, "length" if max_new_tokens or the context is used
            up, else None.
        logprob: natural logarithm of its probability in the model's own distribution, before any sampling option;
            None if GenerationOptions.logprobs is None.
        top_logprobs: the likeliest tokens in its place, as many as GenerationOptions.logprobs, each with its
            logarithm.
    """

    token: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationOptions:
    """Options for choosing tokens and ending a text.

    Attributes:
        sampling: see `SamplingOptions`.
        max_new_tokens: maximum number of new tokens; None for as many as the context holds.
        stop_ids: ids that end the text.
        stop_strings: strings that end the text; see `StopFilter`.
        logprobs: number of likeliest tokens whose probability each step reports, beside its own token's; None for no
            probabilities at all.
        on_full: what to do when the context is full: "stop" ends the text, "slide" calls `Session.slide`.
        shown_ids: special tokens whose names appear in the text; other special tokens do not appear.
        drafter: guesses the next tokens, which changes only the time a text takes; see `runtime.text.speculative`.
    """

    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logprobs: int | None = None
    on_full: Literal["stop", "slide"] = "stop"
    shown_ids: tuple[int, ...] = ()
    drafter: Drafter | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens} is invalid; give 1 or more")
        if "" in self.stop_strings:
            raise InputError("--stop '' is invalid; give at least one character")
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"--logprobs {self.logprobs} is invalid; give 0 or more")


class StopFilter:
    """A filter that passes on a text, piece by piece, up to the stop string that begins earliest.

    Text that may be the beginning of a stop string is held back until that is certain. So the result does not depend on
    how the text was split into pieces.

    Attributes:
        stopped: whether a stop string was reached.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Adds the next piece and returns the text that is certain now."""
        self._held += "" if self.stopped else text
        begun = max(len(self._held) - self._longest + 1, 0)
        while begun < len(self._held) and not any(stop.startswith(self._held[begun:]) for stop in self._stops):
            begun += 1
        found = self._found()
        self.stopped = self.stopped or (found is not None and found <= begun)
        given = self._held[: found if self.stopped else begun]
        self._held = "" if self.stopped else self._held[begun:]
        return given

    def finish(self) -> str:
        """Ends the text and returns what was held back, up to a stop string in it."""
        found = self._found()
        self.stopped = self.stopped or found is not None
        given, self._held = self._held[:found], ""
        return given

    def _found(self) -> int | None:
        """Returns the index of the earliest complete stop string in the held text, or None."""
        return min((i for i in map(self._held.find, self._stops) if i >= 0), default=None)


class Chooser:
    """Chooses one text's tokens from the logits before them.

    Attributes:
        tokens: the prompt and the chosen tokens.
    """

    def __init__(
        self, prompt: Sequence[int], options: SamplingOptions, rng: Rng, constraint: Constraint | None = None
    ) -> None:
        """Starts after `prompt`; `constraint` limits the tokens that may be chosen, see `runtime.text.constraint`."""
        self.tokens = list(prompt)
        self._options, self._rng, self._constraint = options, rng, constraint
        self._mirostat = Mirostat(options) if options.mirostat else None

    def choose(self, logits: Tensor) -> int:
        """Chooses the next token from logits [V]."""
        allowed = self._constraint.allowed() if self._constraint else None
        token = sample(logits, self._options, self._rng, self.tokens, allowed, self._mirostat)
        self._take(token)
        return token

    def follow(self, tokens: Sequence[int]) -> None:
        """Continues as if it had just chosen these tokens."""
        assert self._mirostat is None, "mirostat's state depends on the logits"
        for token in tokens:
            if self._options.temperature:
                self._rng.coin()
            self._take(token)

    def _take(self, token: int) -> None:
        self.tokens.append(token)
        if self._constraint:
            self._constraint.take(token)


class StepBuilder:
    """Builds the steps of one text from its tokens: the text of each token, and whether it ends the text."""

    def __init__(self, prompt: Sequence[int], options: GenerationOptions, tokenizer: Tokenizer | None = None) -> None:
        """Starts after `prompt`.

        Args:
            tokenizer: turns tokens into text; None for steps without text.

        Raises:
            InputError: there are stop strings but no tokenizer.
        """
        if options.stop_strings and tokenizer is None:
            raise InputError(
                f"--stop {options.stop_strings[0]!r} needs a tokenizer, but the file has none; leave it out"
            )
        self._options, self._count = options, 0
        self._decoder = StreamDecoder(tokenizer, prompt) if tokenizer else None
        self._stops = StopFilter(options.stop_strings)
        specials = tokenizer.specials if tokenizer and options.shown_ids else {}
        self._shown = {token: text for text, token in specials.items() if token in options.shown_ids}

    def build(self, token: int, full: bool) -> Step:
        """Returns the step of a chosen token.

        Args:
            full: whether the context has no room for another token.
        """
        options = self._options
        self._count += 1
        stop = token in options.stop_ids
        end = stop or self._count == options.max_new_tokens or (full and options.on_full == "stop")
        text = ""
        if self._decoder and not stop:
            text = self._stops.add(self._shown.get(token) or self._decoder.add(token))
        if end and self._decoder:
            text += self._stops.add(self._decoder.finish()) + self._stops.finish()
        if end or self._stops.stopped:
            return Step(token, text, "stop" if stop or self._stops.stopped else "length")
        return Step(token, text)


class Generation:
    """Generates one text: chooses its tokens and builds its steps."""

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        rng: Rng,
        tokenizer: Tokenizer | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Starts after `prompt`; see `Chooser` and `StepBuilder`."""
        self._builder = StepBuilder(prompt, options, tokenizer)
        self._chooser = Chooser(prompt, options.sampling, rng, constraint)
        self._logprobs = options.logprobs

    @property
    def tokens(self) -> list[int]:
        """The prompt and the chosen tokens."""
        return self._chooser.tokens

    def take(self, logits: Tensor, full: bool) -> Step:
        """Returns the next step, from logits [V]; `full` as in `StepBuilder.build`."""
        step = self._builder.build(self._chooser.choose(logits), full)
        if self._logprobs is None:
            return step
        logprob, top = logprobs(logits, step.token, self._logprobs)
        return replace(step, logprob=logprob, top_logprobs=top)


def generate(
    session: Session,
    prompt: Sequence[int],
    options: GenerationOptions,
    rng: Rng,
    tokenizer: Tokenizer | None = None,
    constraint: Constraint | None = None,
) -> Iterator[Step]:
    """Replaces the session's text by the prompt and yields the tokens that follow it.

    If the session's earlier text begins like the prompt, the common beginning is not run again.

    After P prompt tokens in a context of T positions, T - P + 1 tokens can follow, because the last one is never run.
    If `options.on_full` is "slide", there is no such limit.

    Args:
        tokenizer, constraint: see `Generation`.

    Raises:
        InputError: the prompt is empty or does not fit, see `Session.prefill`; stop strings or a constraint lack a
            tokenizer; or logit_bias has an id that is not in the vocabulary.
    """
    generation = Generation(prompt, options, rng, tokenizer, constraint)
    logits = session.restart(prompt)
    check_ids(options.sampling, len(logits))
    steps = [generation.take(logits, session.position == session.capacity)]
    while True:
        yield from steps
        if steps[-1].finish_reason:
            return
        if session.position == session.capacity:
            session.slide()
        steps = _next(session, generation, options.drafter)


def _next(session: Session, generation: Generation, drafter: Drafter | None) -> list[Step]:
    """Returns the next step, and one more for each token that the drafter guessed correctly."""
    token, room = generation.tokens[-1], min(session.max_proposed, session.capacity - session.position) - 1
    guess = drafter.guess(generation.tokens, room) if drafter and room > 0 else []
    if not guess:
        return [generation.take(session.decode(token), session.position == session.capacity)]
    steps = list[Step]()
    for logits, guessed in zip(session.propose([token, *guess]), [*guess, None], strict=True):
        steps.append(generation.take(logits, session.position + len(steps) + 1 == session.capacity))
        if steps[-1].finish_reason or steps[-1].token != guessed:
            break
    session.accept(len(steps))
    return steps


def score(
    session: Session, prompt: Sequence[int], count: int, tokenizer: Tokenizer | None = None
) -> Iterator[list[Step]]:
    """Replaces the session's text by the prompt without its last token, and yields the prompt's own tokens as steps.

    Each item has the steps that one run of the model gives. The first token has no probability.

    Args:
        count: number of likeliest tokens whose probability each step reports.
    """
    session.reset()
    decoder = StreamDecoder(tokenizer) if tokenizer else None

    def text(token: int) -> str:
        return decoder.add(token) if decoder else ""

    yield [Step(prompt[0], text(prompt[0]))]
    while (start := session.position) < len(prompt) - 1:
        end = min(start + session.chunk, len(prompt) - 1)
        steps = list[Step]()
        for row, token in zip(session.extend(prompt[start:end], end - start), prompt[start + 1 : end + 1], strict=True):
            logprob, top = logprobs(row, token, count)
            steps.append(Step(token, text(token), None, logprob, top))
        yield steps


def embed(session: Session, prompt: Sequence[int]) -> Iterator[Tensor | None]:
    """Replaces the session's text by the prompt and yields its vector: the mean hidden state, scaled to length 1, [D].

    Yields None after each run of the model but the last. The program must return hidden states.
    """
    session.reset()
    total: Tensor | float = 0.0
    while session.position < len(prompt):
        session.prefill(prompt[session.position : session.position + session.chunk])
        assert session.hidden is not None, "the program returns no hidden states"
        total = total + session.hidden.sum(dim=0)
        if session.position < len(prompt):
            yield None
    assert isinstance(total, Tensor), "a prompt is not empty"
    yield total / total.norm()


def steps_to_json(steps: Sequence[Step]) -> dict[str, Any]:
    """Returns a whole text as JSON types: its ids, its text, and its finish reason."""
    return {
        "token_ids": [step.token for step in steps],
        "text": "".join(step.text for step in steps),
        "finish_reason": steps[-1].finish_reason,
    }


def check_ids(options: SamplingOptions, vocab_size: int) -> None:
    """Checks the ids of logit_bias.

    Raises:
        InputError: logit_bias has an id that is not in the vocabulary.
    """
    for token in options.logit_bias:
        if token >= vocab_size:
            raise InputError(f"logit-bias {token} is invalid; give ids from 0 to {vocab_size - 1}")
