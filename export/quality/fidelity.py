"""fidelity: what a .pte computes, against the eager model it was made from: logits, and every block's keys and values.

Each block's new keys and values are results of the program, so that a fault shows in the block behind it, before later
blocks have mixed it with what rounding does to them.
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
"""Tokens decoded greedily after each prompt."""
CHANNEL, POSITION = "channel", "position"
"""What an error of cached rows is of: see `Cached`."""
USUAL = 0.99
"""Share of the tokens that a channel's error is taken over: those that differ least as a whole."""


@dataclass(frozen=True)
class Limits:
    """The largest differences that still pass.

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
        """The limits where the reference differs from itself by `own` when its input changes by rounding alone."""
        error, kl = max(self.error, 10 * own.error), max(self.kl, 4 * own.kl)
        return replace(self, error=error, kl=kl, median_kl=max(self.median_kl, 2 * own.median_kl))


LIMITS = {
    "float32": Limits(error=1e-4, kl=1e-6, median_kl=1e-7, channel=1e-4, position=1e-2),
    "float16": Limits(error=2e-2, kl=1e-4, median_kl=1e-5, channel=5e-3, position=5e-2),
    "int8": Limits(error=2.0, kl=2e-2, median_kl=5e-3, channel=3e-2, position=0.3),
}
"""Between the file and the eager model, by what activations are rounded to on the way: where one lies between two
steps, the last bit of a float decides. Deep models with large activations enlarge that, see `Limits.widened`.
"""


@dataclass(frozen=True)
class Fidelity:
    """Differences between the file's logits and the eager model's.

    Attributes:
        rows: how many rows of logits were compared.
        max_abs: largest absolute difference of a logit.
        error: the same in standard deviations of the eager model's logits in its row.
        mse: mean squared difference.
        kl: largest KL divergence of a row, KL(eager || file), in nats.
        median_kl: median of the rows' divergences.
        greedy_agreement: share of the rows whose most likely token is the same.
        limits: what was allowed.
        cached: the keys or values that differ most for what is allowed there; None where none are compared.
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
        """Whether every difference is a number and within the limits."""
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
    """Keys or values of one block, in the channel (head, and number in it) or position that differs most for its limit.

    Attributes:
        name: k_rows.3 or v_rows.3.
        along: what the error is of: CHANNEL or POSITION.
        error: root mean square of a channel's differences over all tokens but the few that differ most as a whole,
            relative to the block's keys or values; or of a token's over all channels, relative to how far the block's
            keys or values spread over the tokens, and of that the median over the texts that have a token at the
            position. Now and then one rounding of activations takes a whole token elsewhere; what is wrong with a
            channel is so in every token, and what is wrong with a position in every text.
        limit: what was allowed.
    """

    name: str
    along: str
    error: float
    limit: float

    def __str__(self) -> str:
        return f"{self.name} {self.error:.1e} of a {self.along} (limit {self.limit:.1e})"


@dataclass(frozen=True)
class Observed:
    """What a file was seen to compute.

    Attributes:
        texts: each prompt, with what the file made of it.
        logits: [rows, V] for each text: behind the prompt, and each token after it.
        rows: what the caches held of each text in the end: name such as k_rows.3 -> the positions, [n], and their rows,
            [K, n, W] as in `model.kv_row_format`; none where the file has no caches, or slices of them.
        max_seq_len: the length that the rotary tables are made for.
    """

    texts: list[list[int]]
    logits: list[Tensor]
    rows: list[dict[str, tuple[Tensor, Tensor]]]
    max_seq_len: int


def _rounded(scheme: Scheme) -> str:
    return "int8" if scheme.linear.bits or scheme.head.bits else scheme.kv_dtype


def empty_text(program: Program) -> Session | BatchedText:
    """An empty text."""
    return Session(program) if program.metadata.batch_size == 1 else BatchedText(program)


def observed(program: Program) -> Observed:
    """Has the file read prompts and continue them greedily."""
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
    """What the caches hold of a text of `length` tokens, see `Observed.rows`."""
    found = {}
    for name, buffer in session.cache.buffers.items():
        if len(buffer) == kv_heads:
            positions = held(length, buffer.shape[1])
            slots = positions >= 0
            found[session.cache.specs[name].rows] = positions[slots], buffer[:, slots].clone()
    return found


def judge(source: WeightSource, found: Observed) -> Fidelity:
    """Compares what a file computes with the reference. What exceeds the usual limits is held against how far the
    reference gets from itself: roundings compound over blocks, in a right file as there.
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
    """The reference's rows in the place of those found."""
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
    """The median error at each position that several texts have; of two texts the smaller."""
    length = 1 + max(int(positions.max()) for positions in places)
    table = torch.full((len(places), length), torch.nan, dtype=torch.float64)
    for row, positions, error in zip(table, places, errors, strict=True):
        row[positions] = error
    return table.nanmedian(dim=0).values[table.isfinite().sum(dim=0) > 1]


def worst(
    errors: Mapping[tuple[str, str], Tensor], own: Mapping[tuple[str, str], Tensor], limits: Limits
) -> Cached | None:
    """Finds, in what `cached_errors` returns, the error that is largest for its limit. A NaN is the largest.

    Args:
        own: what the reference differs from itself; it widens the limits of the block that it is of.
    """
    found = list[tuple[float, Cached]]()
    for (name, along), error in errors.items():
        if not error.numel():
            continue
        theirs = own.get((name, along), torch.zeros_like(error))
        if along == CHANNEL:
            limit = torch.maximum(theirs, theirs.square().mean().sqrt()).mul(2).clamp(min=limits.channel)
        else:  # which tokens are rounded another way is chance, so that the block's worst stands for all
            limit = theirs.amax().mul(2.5).clamp(min=limits.position).expand_as(error)
        ratio = torch.where(error.isnan(), torch.inf, error / limit).flatten()
        index = int(ratio.argmax())
        values = float(error.flatten()[index]), float(limit.flatten()[index])
        found.append((float(ratio[index]), Cached(name, along, *values)))
    return max(found, key=lambda each: each[0])[1] if found else None


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], limits: Limits) -> Fidelity:
    """Measures logits, each [N, V], against the reference's. A NaN on either side stays NaN, and fails."""
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
    return float(torch.maximum(torch.tensor(a, dtype=torch.float64), b))  # a NaN wins


def _prompts(program: Program) -> list[list[int]]:
    """Texts where there is a tokenizer, and random ids of lengths around the chunk's and, if short, the context's."""
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
