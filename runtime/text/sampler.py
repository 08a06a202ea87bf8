"""Sampling: chooses the next token from logits, as a function of its arguments alone."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.errors import InputError

MIROSTAT_RANKS = 100
"""Number of likeliest tokens from which mirostat estimates the exponent of Zipf's law, as in its publication."""

NEAR_ONE = 1e-6
"""Distance of that exponent from 1 within which the formula's limit is used."""

LONGEST_REPETITION = 50
"""Maximum length of a repetition that DRY measures; the penalty is prohibitive long before."""


@dataclass(frozen=True)
class SamplingOptions:
    """Options for choosing a token.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps only the k most likely tokens; 0 keeps all.
        top_p: keeps only the smallest set of most likely tokens whose probability reaches p (nucleus sampling,
            Holtzman et al. 2020, https://arxiv.org/abs/1904.09751); 1 keeps all.
        min_p: keeps only tokens whose probability is at least p times the likeliest's (Nguyen et al. 2024,
            https://arxiv.org/abs/2407.01082); 0 keeps all.
        typical_p: keeps only the smallest set of tokens whose information is nearest to the entropy and whose
            probability reaches p (locally typical sampling, Meister et al. 2023, https://arxiv.org/abs/2202.00666);
            1 keeps all.
        repetition_penalty: divides the positive logits of tokens in the window and multiplies the negative ones (CTRL,
            Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1); 1 for none.
        presence_penalty: subtracted once from the logit of each token in the window (as OpenAI defines it); 0 for none.
        frequency_penalty: subtracted from a token's logit as often as the token occurs in the window; 0 for none.
        penalty_window: number of latest tokens of the text, prompt included, to which the three penalties apply.
        logit_bias: id -> number that is added to the token's logit.
        dry_multiplier, dry_base, dry_allowed_length: a token that would continue a repetition of n tokens, at least
            dry_allowed_length, loses dry_multiplier * dry_base ** (n - dry_allowed_length) of its logit (DRY,
            https://github.com/oobabooga/text-generation-webui/pull/5677); dry_multiplier 0 for none.
        dry_window: number of latest tokens that are searched for repetitions; None for the whole text.
        dry_breakers: tokens that end a repetition.
        mirostat: 1 or 2 for the paper's algorithm or its simpler second version, which keep the mean information of the
            tokens near a target (Basu et al. 2021, https://arxiv.org/abs/2007.14966); 0 for neither. It replaces top_k,
            top_p, min_p and typical_p.
        mirostat_tau: the target in bits.
        mirostat_eta: how fast the limit follows the difference from the target.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    typical_p: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int | None = None
    dry_breakers: frozenset[int] = frozenset()
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature {self.temperature} is invalid; give 0 or more")
        if self.top_k < 0:
            raise InputError(f"top-k {self.top_k} is invalid; give 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p} is invalid; give more than 0, up to 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min-p {self.min_p} is invalid; give 0 (all) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(
                f"repetition-penalty {self.repetition_penalty} is invalid; give more than 0, where 1 is none"
            )
        for name, penalty in (("presence", self.presence_penalty), ("frequency", self.frequency_penalty)):
            if not math.isfinite(penalty):
                raise InputError(f"{name}-penalty {penalty} is invalid; give a finite number, where 0 is none")
        if self.penalty_window < 1:
            raise InputError(f"penalty-window {self.penalty_window} is invalid; give 1 or more")
        for token, bias in self.logit_bias.items():
            if token < 0 or not math.isfinite(bias):
                raise InputError(f"logit-bias {token}={bias} is invalid; give an id of 0 or more and a finite number")

        self._check_typical_dry_and_mirostat()

    def _check_typical_dry_and_mirostat(self) -> None:
        if not 0 < self.typical_p <= 1:
            raise InputError(f"typical-p {self.typical_p} is invalid; give more than 0, up to 1")
        if not 0 <= self.dry_multiplier < math.inf:
            raise InputError(f"dry-multiplier {self.dry_multiplier} is invalid; give 0 (none) or more")
        if not 1 <= self.dry_base <= 100:
            raise InputError(f"dry-base {self.dry_base} is invalid; give 1 to 100")
        if self.dry_allowed_length < 1:
            raise InputError(f"dry-allowed-length {self.dry_allowed_length} is invalid; give 1 or more")
        if self.dry_window is not None and self.dry_window < 0:
            raise InputError(f"dry-window {self.dry_window} is invalid; give 0 or more")
        if self.mirostat not in (0, 1, 2):
            raise InputError(f"mirostat {self.mirostat} is invalid; give 0 (none), 1 or 2")
        for name, value in (("tau", self.mirostat_tau), ("eta", self.mirostat_eta)):
            if not 0 <= value < math.inf:
                raise InputError(f"mirostat-{name} {value} is invalid; give 0 or more")

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.dry_multiplier)
        return self.repetition_penalty != 1 or any(penalties)


class Mirostat:
    """The state of mirostat in one text; see `SamplingOptions.mirostat`.

    Attributes:
        limit: the greatest information of a token that may be drawn, in bits (mu in the paper).
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.limit = 2 * options.mirostat_tau
        self._options = options

    def kept(self, probabilities: NDArray[np.float64]) -> int:
        """Returns how many of the tokens, of which the likeliest come first, may be drawn; at least 1."""
        if self._options.mirostat == 2:
            return max(int(np.searchsorted(-np.log2(probabilities), self.limit, side="right")), 1)
        size = len(probabilities)
        ranks = np.arange(1, min(MIROSTAT_RANKS, size))
        falls, steps = np.log(probabilities[ranks - 1] / probabilities[ranks]), np.log((ranks + 1) / ranks)
        exponent = float(steps @ falls / (steps @ steps)) if size > 1 else 0.0  # of Zipf's law
        if not exponent > 0:
            return size
        excess = exponent - 1
        share = (1 - size**-excess) / excess if abs(excess) > NEAR_ONE else math.log(size)
        return max(int(math.exp(min((self.limit * math.log(2) - math.log(share)) / exponent, math.log(size)))), 1)

    def observe(self, probability: float) -> None:
        """Moves the limit after a token of this probability among those that might have been drawn."""
        surprise = -math.log2(probability)
        self.limit -= self._options.mirostat_eta * (surprise - self._options.mirostat_tau)


class Rng:
    """The random number generator SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195).

    It gives the same numbers in Python and C++.

    Attributes:
        state: the whole state, 64 bits.
    """

    def __init__(self, seed: int) -> None:
        self.state = seed % 2**64

    def coin(self) -> float:
        """Returns the next number in [0, 1), a multiple of 2^-53."""
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def sample(
    logits: Tensor,
    options: SamplingOptions,
    rng: Rng,
    recent: Sequence[int] = (),
    allowed: NDArray[np.bool_] | None = None,
    mirostat: Mirostat | None = None,
) -> int:
    """Draws a token from logits [V] float32; equal logits rank by id, the lower first.

    The stages, in order: logit_bias is added; the repetition penalty is applied, then the presence and frequency
    penalties, then DRY; tokens that are not allowed are removed; the temperature is applied; then top_k, top_p, min_p
    and typical_p, or mirostat. Temperature 0 takes the highest logit before the temperature stage. All arithmetic is
    float64.

    One random number is drawn per call unless the temperature is 0. Probabilities are summed from the likeliest token
    down if top_k, top_p or mirostat is set, and in the order of ids otherwise.

    Args:
        recent: the text so far, at least its last penalty_window tokens and those that DRY searches; read only if there
            is a penalty.
        allowed: [V], whether each token may be drawn, at least one; None for all.
        mirostat: the state of the text, if options.mirostat is set.
    """
    scores = logits.numpy()
    if options.logit_bias or options.penalises or allowed is not None:
        scores = _adjusted(scores, options, recent, allowed)
    if options.temperature == 0:
        return int(scores.argmax())
    scores = scores.astype(np.float64, copy=False)
    exponents = (scores - scores.max()) / options.temperature
    probabilities = np.exp(exponents)
    if mirostat:
        ids = np.argsort(-probabilities, kind="stable")[: max(int((probabilities > 0).sum()), 1)]
        ids = ids[: mirostat.kept(probabilities[ids] / probabilities.sum())]
    else:
        ids = _kept(exponents, probabilities, options)
    probabilities = probabilities[ids]
    sums = np.cumsum(probabilities)
    drawn = min(int(np.searchsorted(sums, rng.coin() * sums[-1], side="right")), len(ids) - 1)
    if mirostat:
        mirostat.observe(float(probabilities[drawn] / sums[-1]))
    return int(ids[drawn])


def _kept(
    exponents: NDArray[np.float64], probabilities: NDArray[np.float64], options: SamplingOptions
) -> NDArray[np.int64]:
    """Returns the tokens that top_k, top_p, min_p and typical_p keep."""
    ids = np.arange(len(probabilities))
    if options.top_k or options.top_p < 1:
        ids = np.argsort(-probabilities, kind="stable")[: options.top_k or None]
        if options.top_p < 1:
            sums = np.cumsum(probabilities[ids])
            ids = ids[: int(np.searchsorted(sums, options.top_p * sums[-1])) + 1]
    if options.min_p > 0:  # in logarithms, which Python and C++ round alike
        ids = ids[~(exponents[ids] < math.log(options.min_p))]  # keeps NaN, and so at least one token
    if options.typical_p < 1:
        shares = probabilities[ids] / probabilities[ids].sum()
        information = -np.log(np.maximum(shares, np.finfo(np.float64).tiny))
        nearest = np.argsort(np.abs(information - shares @ information), kind="stable")
        ids = ids[np.sort(nearest[: int(np.searchsorted(np.cumsum(shares[nearest]), options.typical_p)) + 1])]
    return ids


def _adjusted(
    logits: NDArray[np.float32], options: SamplingOptions, recent: Sequence[int], allowed: NDArray[np.bool_] | None
) -> NDArray[np.float64]:
    """Applies the stages before temperature; see `sample`."""
    scores = logits.astype(np.float64)
    for token, bias in options.logit_bias.items():
        scores[token] += bias
    if options.penalises:
        counts = Counter(recent[-options.penalty_window :])
        ids, times = np.array(list(counts), np.int64), np.array(list(counts.values()), np.float64)
        repeated, penalty = scores[ids], options.repetition_penalty
        repeated = np.where(repeated > 0, repeated / penalty, repeated * penalty)
        scores[ids] = repeated - (options.presence_penalty + options.frequency_penalty * times)
    if options.dry_multiplier > 0:
        for token, length in _repetitions(recent, options).items():
            scores[token] -= options.dry_multiplier * options.dry_base ** (length - options.dry_allowed_length)
    if allowed is not None:
        scores[~allowed] = -math.inf
    return scores


def _repetitions(recent: Sequence[int], options: SamplingOptions) -> dict[int, int]:
    """Returns each token that would continue a repetition, with the greatest length of what it would continue."""
    start = 0 if options.dry_window is None else max(len(recent) - options.dry_window, 0)
    text, found, length = np.array(recent[start:], np.int64), dict[int, int](), 0
    ends = np.arange(len(text) - 1)  # of the earlier occurrences of the last `length` tokens
    while length < min(LONGEST_REPETITION, len(text)) and ends.size and text[-1 - length] not in options.dry_breakers:
        ends = ends[ends >= length]
        ends = ends[text[ends - length] == text[-1 - length]]
        length += 1
        if length >= options.dry_allowed_length:
            found |= dict.fromkeys(text[ends + 1].tolist(), length)
    return found


def logprobs(logits: Tensor, token: int, k: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Returns natural logarithms of probabilities in softmax(logits), the model's own distribution; logits [V] float32.

    Returns:
        the logarithm for `token`, and the k likeliest tokens with theirs; equal logits rank by id, the lower first.
    """
    given = logits.numpy()
    scores = given.astype(np.float64)
    scores -= scores.max()
    scores -= math.log(np.cumsum(np.exp(scores))[-1])
    k = min(k, len(given))
    likely = np.flatnonzero(given >= np.partition(given, -k)[-k]) if k else np.arange(0)
    ids = likely[np.argsort(-given[likely], kind="stable")][:k]
    return float(scores[token]), tuple((int(i), float(scores[i])) for i in ids)
