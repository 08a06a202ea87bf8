"""sample(logits, options, rng): the next token, a function of its arguments alone."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.errors import InputError


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the smallest set of most likely tokens whose probability reaches p (nucleus sampling, Holtzman et
            al. 2020, https://arxiv.org/abs/1904.09751); 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature {self.temperature} is impossible; give 0 or more")
        if self.top_k < 0:
            raise InputError(f"top-k {self.top_k} is impossible; give 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p} is impossible; give more than 0, up to 1")


class Rng:
    """SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195): 64 bits of state, equal in
    every language.

    Attributes:
        state: all there is to save and restore.
    """

    def __init__(self, seed: int) -> None:
        self.state = seed % 2**64

    def coin(self) -> float:
        """The next number in [0, 1), a multiple of 2^-53."""
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def sample(logits: Tensor, options: SamplingOptions, rng: Rng) -> int:
    """Draws a token from logits [V] float32; equal logits rank by id, the lower first.

    One coin is drawn per call unless the temperature is 0. Probabilities are float64, summed from the likeliest
    token down where top_k or top_p order them, and by id otherwise.
    """
    if options.temperature == 0:
        return int(logits.numpy().argmax())
    scores = logits.numpy().astype(np.float64)
    probabilities = np.exp((scores - scores.max()) / options.temperature)
    ids = np.arange(len(scores))
    if options.top_k or options.top_p < 1:
        ids = np.argsort(-probabilities, kind="stable")[: options.top_k or None]
        probabilities = probabilities[ids]
        if options.top_p < 1:
            sums = np.cumsum(probabilities)
            kept = int(np.searchsorted(sums, options.top_p * sums[-1])) + 1
            ids, probabilities = ids[:kept], probabilities[:kept]
    sums = np.cumsum(probabilities)
    return int(ids[min(np.searchsorted(sums, rng.coin() * sums[-1], side="right"), len(ids) - 1)])
