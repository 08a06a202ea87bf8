"""Sampling: chooses the next token from logits, as a function of its arguments alone."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.errors import InputError


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
        repetition_penalty: divides the positive logits of tokens in the window and multiplies the negative ones (CTRL,
            Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1); 1 for none.
        presence_penalty: subtracted once from the logit of each token in the window (as OpenAI defines it); 0 for none.
        frequency_penalty: subtracted from a token's logit as often as the token occurs in the window; 0 for none.
        penalty_window: number of latest tokens of the text, prompt included, to which the three penalties apply.
        logit_bias: id -> number that is added to the token's logit.
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

    @property
    def penalises(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


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
) -> int:
    """Draws a token from logits [V] float32; equal logits rank by id, the lower first.

    The stages, in order: logit_bias is added; the repetition penalty is applied, then the presence and frequency
    penalties; tokens that are not allowed are removed; the temperature is applied; then top_k, top_p and min_p.
    Temperature 0 takes the highest logit before the temperature stage. All arithmetic is float64.

    One random number is drawn per call unless the temperature is 0. Probabilities are summed from the likeliest token
    down if top_k or top_p is set, and in the order of ids otherwise.

    Args:
        recent: the text so far, at least its last penalty_window tokens; read only if there is a penalty.
        allowed: [V], whether each token may be drawn, at least one; None for all.
    """
    scores = logits.numpy()
    if options.logit_bias or options.penalises or allowed is not None:
        scores = _adjusted(scores, options, recent, allowed)
    if options.temperature == 0:
        return int(scores.argmax())
    scores = scores.astype(np.float64, copy=False)
    exponents = (scores - scores.max()) / options.temperature
    probabilities = np.exp(exponents)
    ids = np.arange(len(scores))
    if options.top_k or options.top_p < 1:
        ids = np.argsort(-probabilities, kind="stable")[: options.top_k or None]
        probabilities = probabilities[ids]
        if options.top_p < 1:
            sums = np.cumsum(probabilities)
            kept = int(np.searchsorted(sums, options.top_p * sums[-1])) + 1
            ids, probabilities = ids[:kept], probabilities[:kept]
    if options.min_p > 0:  # in logarithms, which Python and C++ round alike
        likely = ~(exponents[ids] < math.log(options.min_p))  # keeps NaN, and so at least one token
        ids, probabilities = ids[likely], probabilities[likely]
    sums = np.cumsum(probabilities)
    return int(ids[min(np.searchsorted(sums, rng.coin() * sums[-1], side="right"), len(ids) - 1)])


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
    if allowed is not None:
        scores[~allowed] = -math.inf
    return scores


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
