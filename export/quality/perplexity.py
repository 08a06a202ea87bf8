"""perplexity: what quantising costs: a text, as the model predicts it in float32, quantised, and by the file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from export.quality.eager import packed
from export.quality.layer_errors import Loss, measure_layer_errors
from export.weights.scheme import finer, matrices
from export.weights.source import WeightSource
from model.config import ModelConfig
from model.errors import InputError
from preproc.tokenizer import Tokenizer

TEXT = Path(__file__).with_name("eval_text.txt")
"""Ours: short passages of several kinds, so that any few hundred tokens are a mixture."""

MOST_TOKENS = 512
"""Of a text that are looked at, for a large model."""

SPANS = 32
"""At most, into which positions are put together."""


def read_text(flag: str, path: Path) -> str:
    """The text that a flag names.

    Raises:
        InputError: the file is none of text.
    """
    if not path.is_file():
        raise InputError(f"{flag} {path} is no file; give a text file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {path} is not UTF-8; give a text file that is") from error


@dataclass(frozen=True)
class Gate:
    """What a quantised model is measured on, and held to.

    Attributes:
        text: None takes TEXT.
        text_name: the name of the text.
        max_ppl_increase: the largest relative increase of perplexity that passes; None takes the scheme's own.
    """

    text: str | None = None
    text_name: str = "the built-in text"
    max_ppl_increase: float | None = None

    @staticmethod
    def of(eval_text: Path | None, max_ppl_increase: float | None) -> "Gate":
        """From the flags `--eval-text` and `--max-ppl-increase`.

        Raises:
            InputError: the file is none of text, or the increase is no share.
        """
        if max_ppl_increase is not None and not max_ppl_increase >= 0:
            raise InputError(f"--max-ppl-increase {max_ppl_increase} is impossible; give 0 or more, such as 2%")
        if eval_text is None:
            return Gate(max_ppl_increase=max_ppl_increase)
        return Gate(read_text("--eval-text", eval_text), eval_text.name, max_ppl_increase)

    def read(self) -> str:
        """The text."""
        return TEXT.read_text(encoding="utf-8") if self.text is None else self.text

    def check(self, quantised: bool, tokenizer: Tokenizer | None) -> None:
        """Refuses what would have no effect.

        Raises:
            InputError: it asks for what cannot be measured of such a file.
        """
        if self.text is None and self.max_ppl_increase is None:
            return
        flag = "--max-ppl-increase" if self.text is None else "--eval-text"
        if not quantised:
            raise InputError(f"{flag} is for quantised files, and this one is float32; leave it out")
        if tokenizer is None:
            raise InputError(f"{flag} needs a tokenizer, and the file has none; give --tokenizer FILE, or leave it out")
        if self.text is not None and len(tokenizer.encode(self.text)) < 2:
            raise InputError(f"--eval-text {self.text_name} has fewer than two tokens; give a longer text")


@dataclass(frozen=True)
class Comparison:
    """One model's predictions of a text against another's, the expected ones.

    Attributes:
        tokens: how many were predicted.
        expected_perplexity, perplexity: exp of the mean negative log-likelihood of the tokens; None for random ones.
        mean_kl, max_kl: KL(expected || found) of the predicted distributions, in nats.
        top_1: share of the tokens for which the likeliest prediction is the same.
    """

    tokens: int
    expected_perplexity: float | None
    perplexity: float | None
    mean_kl: float
    max_kl: float
    top_1: float

    def within(self, limit: float) -> bool:
        """Whether perplexity grows by no more than `limit`, be it measured or what the mean KL comes to; of text that
        the expected model wrote itself, it would grow by exp(KL) - 1.

        On text that is unlike what a model was trained on, perplexity can fall while the model is ruined; KL cannot.
        """
        return self.increase is not None and self.increase <= limit and self.mean_kl <= math.log1p(limit)

    @property
    def increase(self) -> float | None:
        """Of the perplexity, relative to the expected one."""
        if self.perplexity is None or self.expected_perplexity is None:
            return None
        return self.perplexity / self.expected_perplexity - 1


@dataclass(frozen=True)
class Span:
    """Means over the positions start to end - 1 of all windows: KL(float32 || quantised), and by how much the negative
    log-likelihood grows, both in nats; None for random tokens.
    """

    start: int
    end: int
    kl: float
    nll_increase: float | None


@dataclass(frozen=True)
class Quality:
    """What was measured.

    Attributes:
        text: the name of the text, or "random tokens".
        windows: tokens predicted in each part of it; none sees another.
        quantised: the eager quantised model against float32.
        file: the .pte against the eager quantised model.
        file_float32: the .pte against float32.
        losses: of every piece, in the model's order.
        spans: the error by position.
        limit: the largest relative increase of perplexity that passes, be it measured or what the mean KL comes to.
        finer: flags that lose less, see `export.weights.scheme.finer`.
    """

    text: str
    windows: tuple[int, ...]
    quantised: Comparison
    file: Comparison
    file_float32: Comparison
    losses: tuple[Loss, ...]
    spans: tuple[Span, ...]
    limit: float
    finer: tuple[str, ...] = ()

    @property
    def worst(self) -> tuple[Loss, ...]:
        """Up to three pieces whose own error is largest, and within a fourth of the largest one's."""
        ranked = sorted(self.losses, key=lambda loss: -math.inf if math.isnan(loss.own) else -loss.own)[:3]
        return tuple(loss for loss in ranked if not loss.own < ranked[0].own / 4)

    @property
    def failure(self) -> str | None:
        """Why it does not pass, in a sentence."""
        if self.quantised.increase is None or self.quantised.within(self.limit):  # a NaN fails
            return None
        worst = ", ".join(loss.worst for loss in self.worst)
        auto = "; --auto finds the smallest scheme that passes" if "--quantize 8da8w" in self.finer else ""
        return (
            f"quantising costs too much: {self._costs}; the worst layers: {worst}; finer is each of "
            f"{', '.join(self.finer)}{auto}; to write it all the same, give --max-ppl-increase {self._allowing}"
        )

    @property
    def _allowing(self) -> str:
        """The least whole percentage as limit that the quantised model is within."""
        found = self.quantised
        if found.increase is None or not math.isfinite(found.increase + found.mean_kl):
            return "SHARE"  # a NaN passes none
        return f"{math.ceil(100 * max(found.increase, math.expm1(found.mean_kl)) + 1e-9)}%"

    @property
    def kl_limit(self) -> float:
        """The largest mean KL that passes: of text that float32 wrote itself, perplexity would grow by exp(KL) - 1.

        On text that is unlike what a model was trained on, perplexity can fall while the model is ruined; this cannot.
        """
        return math.log1p(self.limit)

    def __str__(self) -> str:
        found = self.quantised
        agreement = f"top-1 {found.top_1:.1%} of {found.tokens} tokens"
        if found.perplexity is None:
            return f"no tokenizer, so random tokens and no perplexity: mean KL {found.mean_kl:.2g}, {agreement}"
        return f"{self._costs}; of the file {self.file.perplexity:.4g}; {agreement}"

    @property
    def _costs(self) -> str:
        found = self.quantised
        return (
            f"perplexity {found.perplexity:.4g}, in float32 {found.expected_perplexity:.4g} ({found.increase:+.1%}, "
            f"limit {percent(self.limit)}), mean KL {found.mean_kl:.2g} (limit {self.kl_limit:.2g})"
        )


def percent(share: float) -> str:
    """0.1 -> 10%."""
    return f"{100 * share:.3g}%"


def most_tokens(config: ModelConfig) -> int:
    """Of a text that are looked at: of a small model more, for little, because what a token loses varies widely."""
    weights = sum(rows * columns for rows, columns in matrices(config).values())
    return MOST_TOKENS if weights > 1e8 else 4 * MOST_TOKENS


def windows(ids: Sequence[int], bos_id: int | None, capacity: int, most: int = MOST_TOKENS) -> list[list[int]]:
    """A text in parts of up to capacity + 1 tokens, of which each but the last is given and each but the first is
    predicted; up to `most` of all.
    """
    start = [] if bos_id is None else [bos_id]
    found, left, position = list[list[int]](), most, 0
    while left and len(part := start + list(ids[position : position + min(capacity, left) + 1 - len(start)])) > 1:
        found.append(part)
        left -= len(part) - 1
        position += len(part) - len(start)
    return found


def random_windows(vocab_size: int, capacity: int) -> list[list[int]]:
    """The same of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2 * MOST_TOKENS,), generator=generator).tolist()
    return windows(ids, None, capacity)


class Rows(NamedTuple):
    """Two models' predictions, token by token, [N] float64 each: negative log-likelihoods, KL(expected || found), and
    1 where the likeliest token is the same.
    """

    expected_nll: Tensor
    nll: Tensor
    kl: Tensor
    agrees: Tensor

    @staticmethod
    def of(expected: Tensor, found: Tensor, targets: Tensor) -> "Rows":
        """From logits [N, V] and the tokens that come, [N]."""
        p, q = F.log_softmax(expected.double(), dim=-1), F.log_softmax(found.double(), dim=-1)
        chosen = targets.unsqueeze(1)
        agrees = (expected.argmax(-1) == found.argmax(-1)).double()
        return Rows(-p.gather(1, chosen)[:, 0], -q.gather(1, chosen)[:, 0], (p.exp() * (p - q)).sum(-1), agrees)

    @staticmethod
    def concatenate(parts: Sequence["Rows"]) -> "Rows":
        """Of one after another."""
        return Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def comparison(self, is_text: bool) -> Comparison:
        """All in all."""
        expected, found = (float(nll.mean().exp()) if is_text else None for nll in (self.expected_nll, self.nll))
        kl, top_1 = self.kl, float(self.agrees.mean())
        return Comparison(len(kl), expected, found, float(kl.mean()), float(kl.max()), top_1)


def measure(
    source: WeightSource,
    texts: Sequence[Sequence[int]],
    file_logits: Tensor,
    max_seq_len: int,
    text_name: str | None,
    limit: float,
) -> Quality:
    """Measures a quantised model against itself in float32.

    Args:
        texts: `windows` of a text.
        file_logits: [M, V], the .pte's behind the first M of the tokens given.
        max_seq_len: the length that the rotary tables are made for.
        text_name: the text's name; None for random tokens.
        limit: the largest relative increase of perplexity that passes.
    """
    rows: tuple[list[Rows], list[Rows], list[Rows]] = ([], [], [])
    targets = torch.tensor([token for text in texts for token in text[1:]])

    def take(start: int, exact: Tensor, found: Tensor) -> None:
        wanted, of_file = targets[start : start + len(exact)], file_logits[start : start + len(exact)]
        rows[0].append(Rows.of(exact, found, wanted))
        if count := len(of_file):
            rows[1].append(Rows.of(found[:count], of_file, wanted[:count]))
            rows[2].append(Rows.of(exact[:count], of_file, wanted[:count]))

    losses = measure_layer_errors(source, packed(source.config, [text[:-1] for text in texts], max_seq_len), take)
    is_text, lengths = text_name is not None, tuple(len(text) - 1 for text in texts)
    quantised, file, file_float32 = map(Rows.concatenate, rows)
    return Quality(
        text_name or "random tokens",
        lengths,
        quantised.comparison(is_text),
        file.comparison(is_text),
        file_float32.comparison(is_text),
        losses,
        _spans(quantised, lengths, is_text),
        limit,
        tuple(finer(source.scheme)),
    )


def _spans(rows: Rows, lengths: Sequence[int], is_text: bool) -> tuple[Span, ...]:
    positions = torch.cat([torch.arange(length) for length in lengths])
    longest = max(lengths)
    width, spans = math.ceil(longest / SPANS), list[Span]()
    for start in range(0, longest, width):
        here = (positions >= start) & (positions < start + width)
        grown = float((rows.nll - rows.expected_nll)[here].mean()) if is_text else None
        spans.append(Span(start, min(start + width, longest), float(rows.kl[here].mean()), grown))
    return tuple(spans)
