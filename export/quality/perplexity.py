"""Cost of quantisation, measured by the predictions of a text by the float32 model, the quantised model and the
file.
"""

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
"""The built-in text: short passages of several kinds, so that any few hundred tokens are a mixture."""

MOST_TOKENS = 512
"""Maximum number of tokens of a text that are used for a large model."""

SPANS = 32
"""Maximum number of position ranges in `Quality.spans`."""


def read_text(flag: str, path: Path) -> str:
    """Returns the text of the file that a flag names.

    Raises:
        InputError: the file does not exist or is not a text file.
    """
    if not path.is_file():
        raise InputError(f"{flag} {path} is not a file; give a text file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {path} is not UTF-8; give a text file in UTF-8") from error


@dataclass(frozen=True)
class Gate:
    """The text on which a quantised model is measured, and the limit that it must meet.

    Attributes:
        text: the text; None for the built-in TEXT.
        text_name: name of the text.
        max_ppl_increase: largest relative increase of perplexity that passes; None for the scheme's default.
    """

    text: str | None = None
    text_name: str = "the built-in text"
    max_ppl_increase: float | None = None

    @staticmethod
    def of(eval_text: Path | None, max_ppl_increase: float | None) -> "Gate":
        """Creates a gate from the flags `--eval-text` and `--max-ppl-increase`.

        Raises:
            InputError: the file is not a text file, or the increase is negative.
        """
        if max_ppl_increase is not None and not max_ppl_increase >= 0:
            raise InputError(f"--max-ppl-increase {max_ppl_increase} is invalid; give 0 or more, such as 2%")
        if eval_text is None:
            return Gate(max_ppl_increase=max_ppl_increase)
        return Gate(read_text("--eval-text", eval_text), eval_text.name, max_ppl_increase)

    def read(self) -> str:
        """Returns the text."""
        return TEXT.read_text(encoding="utf-8") if self.text is None else self.text

    def check(self, quantised: bool, tokenizer: Tokenizer | None) -> None:
        """Checks that the settings have an effect on a file.

        Raises:
            InputError: the settings cannot be applied to such a file.
        """
        if self.text is None and self.max_ppl_increase is None:
            return
        flag = "--max-ppl-increase" if self.text is None else "--eval-text"
        if not quantised:
            raise InputError(f"{flag} needs a quantised file, but this one is float32; leave it out")
        if tokenizer is None:
            raise InputError(f"{flag} needs a tokenizer, but the file has none; give --tokenizer FILE, or leave it out")
        if self.text is not None and len(tokenizer.encode(self.text)) < 2:
            raise InputError(f"--eval-text {self.text_name} has fewer than two tokens; give a longer text")


@dataclass(frozen=True)
class Comparison:
    """Comparison of one model's predictions of a text with another's, the expected ones.

    Attributes:
        tokens: number of tokens predicted.
        expected_perplexity, perplexity: exp of the mean negative log-likelihood of the tokens; None for random tokens.
        mean_kl, max_kl: KL(expected || found) of the predicted distributions, in nats.
        top_1: share of the tokens with the same most likely prediction.
    """

    tokens: int
    expected_perplexity: float | None
    perplexity: float | None
    mean_kl: float
    max_kl: float
    top_1: float

    def within(self, limit: float) -> bool:
        """Returns whether perplexity increases by at most `limit`, both as measured and as implied by the mean KL: on
        text written by the expected model itself, it would increase by exp(KL) - 1.

        On text unlike the training data, the perplexity of a badly damaged model can decrease; KL cannot.
        """
        return self.increase is not None and self.increase <= limit and self.mean_kl <= math.log1p(limit)

    @property
    def increase(self) -> float | None:
        """Increase of the perplexity, relative to the expected one; None for random tokens."""
        if self.perplexity is None or self.expected_perplexity is None:
            return None
        return self.perplexity / self.expected_perplexity - 1


@dataclass(frozen=True)
class Span:
    """Mean errors at the positions start to end - 1 of all windows.

    Attributes:
        kl: KL(float32 || quantised), in nats.
        nll_increase: increase of the negative log-likelihood, in nats; None for random tokens.
    """

    start: int
    end: int
    kl: float
    nll_increase: float | None


@dataclass(frozen=True)
class Quality:
    """Results of measuring a quantised model.

    Attributes:
        text: name of the text, or "random tokens".
        windows: number of tokens predicted in each window of the text. Windows are independent of each other.
        quantised: the eager quantised model compared with float32.
        file: the .pte compared with the eager quantised model.
        file_float32: the .pte compared with float32.
        losses: loss of every piece, in the model's order.
        spans: errors by position.
        limit: largest relative increase of perplexity that passes, both as measured and as implied by the mean KL.
        finer: flags that reduce the loss, see `export.weights.scheme.finer`.
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
        """Pieces with the largest own errors: at most three, each with at least a fourth of the largest error."""
        ranked = sorted(self.losses, key=lambda loss: -math.inf if math.isnan(loss.own) else -loss.own)[:3]
        return tuple(loss for loss in ranked if not loss.own < ranked[0].own / 4)

    @property
    def failure(self) -> str | None:
        """Reason why the model does not pass, in a sentence; None if it passes."""
        if self.quantised.increase is None or self.quantised.within(self.limit):  # a NaN fails
            return None
        worst = ", ".join(loss.worst for loss in self.worst)
        auto = "; --auto finds the smallest scheme that passes" if "--quantize 8da8w" in self.finer else ""
        return (
            f"quantising costs too much: {self._costs}; the worst layers: {worst}; more accurate are "
            f"{', '.join(self.finer)}{auto}; to write the file anyway, give --max-ppl-increase {self._allowing}"
        )

    @property
    def _allowing(self) -> str:
        """Smallest whole percentage that would pass as the limit; "SHARE" if none would."""
        found = self.quantised
        if found.increase is None or not math.isfinite(found.increase + found.mean_kl):
            return "SHARE"  # a NaN never passes
        return f"{math.ceil(100 * max(found.increase, math.expm1(found.mean_kl)) + 1e-9)}%"

    @property
    def kl_limit(self) -> float:
        """Largest mean KL that passes. On text written by the float32 model itself, perplexity would increase by
        exp(KL) - 1.

        On text unlike the training data, the perplexity of a badly damaged model can decrease; KL cannot.
        """
        return math.log1p(self.limit)

    def __str__(self) -> str:
        found = self.quantised
        agreement = f"top-1 {found.top_1:.1%} of {found.tokens} tokens"
        if found.perplexity is None:
            return f"random tokens and no perplexity, for lack of a tokenizer: mean KL {found.mean_kl:.2g}, {agreement}"
        return f"{self._costs}; the file's perplexity {self.file.perplexity:.4g}; {agreement}"

    @property
    def _costs(self) -> str:
        found = self.quantised
        return (
            f"perplexity {found.perplexity:.4g}, in float32 {found.expected_perplexity:.4g} ({found.increase:+.1%}, "
            f"limit {percent(self.limit)}), mean KL {found.mean_kl:.2g} (limit {self.kl_limit:.2g})"
        )


def percent(share: float) -> str:
    """Formats a share as a percentage: 0.1 -> 10%."""
    return f"{100 * share:.3g}%"


def most_tokens(config: ModelConfig) -> int:
    """Returns the maximum number of tokens of a text that are used. It is higher for a small model, which is fast to
    run, because the loss varies widely between tokens.
    """
    weights = sum(rows * columns for rows, columns in matrices(config).values())
    return MOST_TOKENS if weights > 1e8 else 4 * MOST_TOKENS


def windows(ids: Sequence[int], bos_id: int | None, capacity: int, most: int = MOST_TOKENS) -> list[list[int]]:
    """Splits a text into windows of up to capacity + 1 tokens. All tokens of a window but the last are inputs, and all
    but the first are predicted, at most `most` in total.
    """
    start = [] if bos_id is None else [bos_id]
    found, left, position = list[list[int]](), most, 0
    while left and len(part := start + list(ids[position : position + min(capacity, left) + 1 - len(start)])) > 1:
        found.append(part)
        left -= len(part) - 1
        position += len(part) - len(start)
    return found


def random_windows(vocab_size: int, capacity: int) -> list[list[int]]:
    """Returns windows of random tokens, see `windows`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2 * MOST_TOKENS,), generator=generator).tolist()
    return windows(ids, None, capacity)


class Rows(NamedTuple):
    """Two models' predictions for each token, [N] float64 each: negative log-likelihoods, KL(expected || found), and 1
    if the most likely token is the same, otherwise 0.
    """

    expected_nll: Tensor
    nll: Tensor
    kl: Tensor
    agrees: Tensor

    @staticmethod
    def of(expected: Tensor, found: Tensor, targets: Tensor) -> "Rows":
        """Computes the rows from logits [N, V] of both models and the tokens that follow, [N]."""
        p, q = F.log_softmax(expected.double(), dim=-1), F.log_softmax(found.double(), dim=-1)
        chosen = targets.unsqueeze(1)
        agrees = (expected.argmax(-1) == found.argmax(-1)).double()
        return Rows(-p.gather(1, chosen)[:, 0], -q.gather(1, chosen)[:, 0], (p.exp() * (p - q)).sum(-1), agrees)

    @staticmethod
    def concatenate(parts: Sequence["Rows"]) -> "Rows":
        """Concatenates rows in the given order."""
        return Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def comparison(self, is_text: bool) -> Comparison:
        """Returns the comparison over all rows."""
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
    """Measures a quantised model against the same model in float32.

    Args:
        texts: `windows` of a text.
        file_logits: [M, V], logits of the .pte after each of the first M input tokens.
        max_seq_len: length for which the rotary tables are made.
        text_name: name of the text; None for random tokens.
        limit: largest relative increase of perplexity that passes.
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
