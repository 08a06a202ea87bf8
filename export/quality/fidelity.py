"""Comparison of a .pte with the eager model it was made from: logits, and the keys and values of every block.

The new keys and values of each block are results of the program. An error therefore shows in the block after it, before
later blocks have mixed it with the effects of rounding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from export.quality.eager import Expected, expected_of, perturbed
from export.weights.scheme import Scheme
from export.weights.source import WeightSource
from model.kv_row_format import decode
from preproc.mask import held
from runtime.engine.batched_session import BatchedText
from runtime.engine.program import Program
from runtime.engine.session import Session

PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
)
DECODED = 16
"""Number of tokens decoded greedily after each prompt."""
CHANNEL, POSITION = "channel", "position"
"""Kinds of error of cached rows, see `Cached`."""
USUAL = 0.99
"""Share of the tokens that a channel's error is computed from: those that differ least as a whole."""


@dataclass(frozen=True)
class Limits:
    """Largest differences that pass.

    Attributes:
        error, kl, median_kl: see `Fidelity`.
        channel, position: see `Cached.error`.
    """

    error: float
    kl: float
    median_kl: float
    channel: float
    position: float

    def widened(self, own: "Fidelity") -> "Limits":
        """Returns limits widened for a model whose reference differs from itself by `own` after a change of its input
        by rounding errors.
        """
        error, kl = max(self.error, 10 * own.error), max(self.kl, 4 * own.kl)
        return replace(self, error=error, kl=kl, median_kl=max(self.median_kl, 2 * own.median_kl))


LIMITS = {
    "float32": Limits(error=1e-4, kl=1e-6, median_kl=1e-7, channel=1e-4, position=1e-2),
    "float16": Limits(error=2e-2, kl=1e-4, median_kl=1e-5, channel=5e-3, position=5e-2),
    "int8": Limits(error=2.0, kl=2e-2, median_kl=5e-3, channel=3e-2, position=0.3),
}
"""Limits of the differences between the file and the eager model, by the format to which activations or cached rows are
rounded. A value between two rounding steps can go either way, depending on the last bit of a float. In deep models with
large activations the effect is larger, see `Limits.widened`.
"""


@dataclass(frozen=True)
class Fidelity:
    """Differences between the file's logits and the eager model's.

    Attributes:
        rows: number of rows of logits compared.
        max_abs: largest absolute difference of a logit.
        error: largest absolute difference, in standard deviations of the eager model's logits in its row.
        mse: mean squared difference.
        kl: largest KL divergence of a row, KL(eager || file), in nats.
        median_kl: median of the rows' divergences.
        greedy_agreement: share of the rows with the same most likely token.
        limits: largest differences that pass.
        cached: keys or values with the largest error relative to its limit; None if none are compared.
    """

    rows: int
    max_abs: float
    error: float
    mse: float
    kl: float
    median_kl: float
    greedy_agreement: float
    limits: Limits
    cached: "Cached | None" = None

    @property
    def passed(self) -> bool:
        """Whether every difference is a number and within its limit."""
        limits = self.limits
        is_near = self.error <= limits.error and self.kl <= limits.kl and self.median_kl <= limits.median_kl
        return is_near and (self.cached is None or self.cached.error <= self.cached.limit)

    def __str__(self) -> str:
        limits = self.limits
        cached = f"; {self.cached}" if self.cached else ""
        return (
            f"error {self.error:.1e} of the logits' spread (limit {limits.error:.1e}), KL {self.kl:.1e} (limit "
            f"{limits.kl:.1e}), median {self.median_kl:.1e} (limit {limits.median_kl:.1e}), MSE {self.mse:.1e}, "
            f"greedy {self.greedy_agreement:.1%} of {self.rows} rows{cached}"
        )


@dataclass(frozen=True)
class Cached:
    """Error of one block's keys or values, in the channel (one number of a head) or at the position where it is largest
    relative to its limit.

    Attributes:
        name: k_rows.3 or v_rows.3.
        along: CHANNEL or POSITION.
        error: for a channel, the root mean square of its differences over all tokens except the 1% that differ most as
            a whole, relative to the root mean square of the block's keys or values. For a position, the root mean
            square of a token's differences over all channels, relative to the spread of the block's keys or values over
            the tokens, as the median over the texts that have a token at the position. A single rounding of activations
            occasionally changes a whole token, while a faulty channel is wrong in every token and a faulty position in
            every text.
        limit: largest error that passes.
    """

    name: str
    along: str
    error: float
    limit: float

    def __str__(self) -> str:
        return f"{self.name} {self.error:.1e} of a {self.along} (limit {self.limit:.1e})"


@dataclass(frozen=True)
class Observed:
    """Results observed by running a file.

    Attributes:
        texts: each prompt followed by the tokens that the file generated.
        logits: one tensor [rows, V] per text: the logits after the prompt and after each generated token.
        rows: final content of the caches for each text. It maps names such as k_rows.3 to positions [n] and their rows,
            [K, n, W] as in `model.kv_row_format`; empty for a file without caches, or with slices of them.
        max_seq_len: length for which the rotary tables are made.
    """

    texts: list[list[int]]
    logits: list[Tensor]
    rows: list[dict[str, tuple[Tensor, Tensor]]]
    max_seq_len: int


def _rounded(scheme: Scheme) -> str:
    return "int8" if scheme.rounds_inputs else scheme.kv_dtype


def empty_text(program: Program) -> Session | BatchedText:
    """Returns an empty text for the program."""
    return Session(program) if program.metadata.batch_size == 1 else BatchedText(program)


def observed(program: Program) -> Observed:
    """Runs the file on prompts and continues them greedily."""
    texts, logits, cached = list[list[int]](), list[Tensor](), list[dict[str, tuple[Tensor, Tensor]]]()
    session = empty_text(program)
    for prompt in _prompts(program):
        session.reset()
        rows, text = [session.prefill(prompt)], list(prompt)
        while len(rows) <= DECODED and session.position < session.capacity:
            text.append(int(rows[-1].argmax()))
            rows.append(session.decode(text[-1]))
        texts.append(text)
        logits.append(torch.stack(rows))
        cached.append(_cached(session, program.metadata.config.n_kv_heads, len(text)))
    return Observed(texts, logits, cached, program.metadata.max_seq_len)


def _cached(session: Session | BatchedText, kv_heads: int, length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the content of the caches after a text of `length` tokens, see `Observed.rows`."""
    found = {}
    for name, buffer in session.cache.buffers.items():
        if len(buffer) == kv_heads:
            positions = held(length, buffer.shape[1])
            slots = positions >= 0
            found[session.cache.specs[name].rows] = positions[slots], buffer[:, slots].clone()
    return found


def judge(source: WeightSource, found: Observed) -> Fidelity:
    """Compares the results of a file with the reference.

    If the usual limits are exceeded, the limits are widened by the difference of the reference from a perturbed
    reference, because rounding errors compound over blocks in a correct file as well.
    """
    limits = LIMITS[_rounded(source.scheme)]
    expected = _expected(source, found, is_perturbed=False)
    errors = cached_errors(found, expected)
    fidelity = replace(compare(found.logits, expected.logits, limits), cached=worst(errors, {}, limits))
    if fidelity.passed:
        return fidelity
    other = _expected(source, found, is_perturbed=True)
    own = cached_errors(replace(found, rows=_as_cached(other, found)), expected)
    widened = limits.widened(compare(other.logits, expected.logits, limits))
    return replace(compare(found.logits, expected.logits, widened), cached=worst(errors, own, limits))


def _expected(source: WeightSource, found: Observed, is_perturbed: bool) -> Expected:
    model = perturbed(source.streamed()) if is_perturbed else source.streamed()
    return expected_of(model, found.texts, [len(rows) for rows in found.logits], found.max_seq_len)


def _as_cached(other: Expected, found: Observed) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Returns the reference's rows at the positions of the rows found in the caches."""
    return [
        {name: (positions, theirs[name][:, positions]) for name, (positions, _) in ours.items()}
        for ours, theirs in zip(found.rows, other.rows, strict=True)
    ]


def cached_errors(found: Observed, expected: Expected) -> dict[tuple[str, str], Tensor]:
    """Returns the errors of every block, see `Cached`: (name, CHANNEL) -> [K, Dh], (name, POSITION) -> [n] float64."""
    errors = {}
    for name in found.rows[0]:
        places = [ours[name][0] for ours in found.rows]
        pairs = [(ours[name], theirs[name]) for ours, theirs in zip(found.rows, expected.rows, strict=True)]
        right = torch.cat([theirs[:, positions] for (positions, _), theirs in pairs], dim=1).double()
        difference = torch.cat([decode(rows) for (_, rows), _ in pairs], dim=1).double() - right
        spread = (right - right.mean(dim=1, keepdim=True)).square().mean().sqrt()
        tokens = _relative(difference.square().mean(dim=(0, 2)).sqrt(), spread)
        usual = tokens.nan_to_num(0.0).argsort()[: math.ceil(USUAL * len(tokens))]  # a NaN stays in
        errors[name, CHANNEL] = _relative(
            difference[:, usual].square().mean(dim=1).sqrt(), right.square().mean().sqrt()
        )
        errors[name, POSITION] = _medians(places, torch.split(tokens, [len(positions) for positions in places]))
    return errors


def _relative(error: Tensor, size: Tensor) -> Tensor:
    return torch.where(error == 0, 0.0, error / size)


def _medians(places: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
    """Returns the median error at each position that at least two texts have; for two texts, it is the smaller
    error.
    """
    length = 1 + max(int(positions.max()) for positions in places)
    table = torch.full((len(places), length), torch.nan, dtype=torch.float64)
    for row, positions, error in zip(table, places, errors, strict=True):
        row[positions] = error
    return table.nanmedian(dim=0).values[table.isfinite().sum(dim=0) > 1]


def worst(
    errors: Mapping[tuple[str, str], Tensor], own: Mapping[tuple[str, str], Tensor], limits: Limits
) -> Cached | None:
    """Finds the error that is largest relative to its limit, in a result of `cached_errors`. A NaN counts as the
    largest.

    Args:
        own: errors of the perturbed reference, which widen the limits of the same block.
    """
    found = list[tuple[float, Cached]]()
    for (name, along), error in errors.items():
        if not error.numel():
            continue
        theirs = own.get((name, along), torch.zeros_like(error))
        if along == CHANNEL:
            limit = torch.maximum(theirs, theirs.square().mean().sqrt()).mul(2).clamp(min=limits.channel)
        else:  # which tokens round differently is chance, so the largest error of the block applies to all
            limit = theirs.amax().mul(2.5).clamp(min=limits.position).expand_as(error)
        ratio = torch.where(error.isnan(), torch.inf, error / limit).flatten()
        index = int(ratio.argmax())
        values = float(error.flatten()[index]), float(limit.flatten()[index])
        found.append((float(ratio[index]), Cached(name, along, *values)))
    return max(found, key=lambda each: each[0])[1] if found else None


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], limits: Limits) -> Fidelity:
    """Compares logits, [N, V] each, with the reference's. A NaN on either side results in NaN, which does not pass."""
    max_abs, error, squares, agreed, divergences = 0.0, 0.0, 0.0, 0.0, list[Tensor]()
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = ours.double(), theirs.double()
        difference = ours - theirs
        p, q = F.log_softmax(theirs, dim=-1), F.log_softmax(ours, dim=-1)
        max_abs = _larger(max_abs, difference.abs().max())
        error = _larger(error, (difference.abs().amax(dim=-1) / theirs.std(dim=-1)).max())
        divergences.append((p.exp() * (p - q)).sum(dim=-1))
        squares += float(difference.square().mean(dim=-1).sum())
        agreed += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
    rows = torch.cat(divergences)
    count, kl, median = len(rows), float(rows.max()), float(rows.quantile(0.5))
    return Fidelity(count, max_abs, error, squares / count, kl, median, agreed / count, limits)


def _larger(a: float, b: Tensor) -> float:
    return float(torch.maximum(torch.tensor(a, dtype=torch.float64), b))  # a NaN is kept


def _prompts(program: Program) -> list[list[int]]:
    """Returns the prompts: random ids of lengths around the chunk's and, if it is short, the context's; and texts if
    there is a tokenizer.
    """
    metadata = program.metadata
    chunk, capacity = metadata.chunk, metadata.max_seq_len
    lengths = {1, chunk - 1, chunk, chunk + 1, 2 * chunk + 3} | (
        {capacity - 8, capacity} if capacity <= 1024 else set()
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(metadata.config.vocab_size, (length,), generator=generator).tolist()
        for length in sorted(lengths)
        if 0 < length <= capacity
    ]
    if program.tokenizer:
        start = [] if metadata.bos_id is None else [metadata.bos_id]
        texts = (start + program.tokenizer.encode(text) for text in PROMPTS)
        prompts += [tokens[:capacity] for tokens in texts if tokens]
    return prompts
