from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process

from model.errors import InputError
from runtime.text import sampler
from runtime.text.sampler import Mirostat, Rng, SamplingOptions, logprobs, sample

LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0])


def share(options: SamplingOptions, draws: int = 20000) -> np.ndarray:
    rng = Rng(1)
    tokens = [sample(LOGITS, options, rng) for _ in range(draws)]
    return np.bincount(tokens, minlength=len(LOGITS)) / draws


def test_splitmix64_gives_its_published_numbers() -> None:
    """The first outputs for seed 1234567, as the reference implementation prints them (prng.di.unimi.it)."""
    rng = Rng(1234567)
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    assert [rng.coin() for _ in published] == [(number >> 11) * 2.0**-53 for number in published]


def test_temperature_zero_takes_the_first_of_the_likeliest_and_draws_no_coin() -> None:
    rng = Rng(5)
    assert sample(LOGITS, SamplingOptions(), rng) == 1
    assert rng.state == 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_token_frequencies_follow_softmax(temperature: float) -> None:
    expected = torch.softmax(LOGITS.double() / temperature, dim=0).numpy()
    assert np.abs(share(SamplingOptions(temperature)) - expected).max() < 0.012  # 3.4 sigma of 20,000 draws


def test_top_k_and_top_p_cut_the_tail_and_keep_the_ratios() -> None:
    p = torch.softmax(LOGITS.double(), dim=0).numpy()
    for options, kept in (
        (SamplingOptions(1.0, top_k=1), [1]),
        (SamplingOptions(1.0, top_k=3), [1, 3, 2]),
        (SamplingOptions(1.0, top_p=1e-9), [1]),
        (SamplingOptions(1.0, top_p=float(p[1] + p[3]) - 1e-6), [1, 3]),
        (SamplingOptions(1.0, top_p=float(p[1] + p[3]) + 1e-6), [1, 3, 2]),
        (SamplingOptions(1.0, top_k=2, top_p=0.4), [1]),
    ):
        expected = np.zeros(len(p))
        expected[kept] = p[kept] / p[kept].sum()
        assert np.abs(share(options) - expected).max() < 0.012


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.integers(0, 45),
       st.floats(0.01, 1), st.floats(0.01, 10), st.integers())  # fmt: skip
def test_a_draw_is_always_among_the_tokens_that_were_kept(
    values: list[float], top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    logits = torch.tensor(values)
    token = sample(logits, SamplingOptions(temperature, top_k, top_p), Rng(seed))
    assert sample(logits, SamplingOptions(temperature, top_k, top_p), Rng(seed)) == token
    rank = int((logits > logits[token]).sum())
    assert rank < (top_k or len(values))
    better = torch.softmax(logits.double() / temperature, 0)[logits > logits[token]].sum()
    assert better < top_p + 1e-9


class Coin(Rng):
    """A random generator that returns a fixed number."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self._value = value

    def coin(self) -> float:
        return self._value


def transformers_scores(logits: Tensor, options: SamplingOptions, recent: list[int]) -> Tensor:
    """Applies transformers' processors to logits [V] and returns float64, -inf for excluded tokens. OpenAI's two
    penalties, which transformers lacks, follow https://platform.openai.com/docs/api-reference/completions.
    """
    window = recent[-options.penalty_window :]
    ids = torch.tensor([window], dtype=torch.int64)
    scores = logits.double()[None]
    if options.logit_bias:
        bias = {(token,): value for token, value in options.logit_bias.items()}
        scores = logits_process.SequenceBiasLogitsProcessor(bias)(ids, scores)
    scores = logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(ids, scores)
    for token, count in Counter(window).items():
        scores[0, token] -= count * options.frequency_penalty + float(count > 0) * options.presence_penalty
    if options.temperature:
        scores = logits_process.TemperatureLogitsWarper(options.temperature)(ids, scores)
    if options.top_k:
        scores = logits_process.TopKLogitsWarper(options.top_k)(ids, scores)
    scores = logits_process.TopPLogitsWarper(options.top_p)(ids, scores)
    scores = logits_process.MinPLogitsWarper(options.min_p)(ids, scores)
    if options.typical_p < 1:
        scores = logits_process.TypicalLogitsWarper(options.typical_p)(ids, scores)
    return scores[0]


@given(
    seed=st.integers(0, 10**6),
    recent=st.lists(st.integers(0, 29), max_size=12),
    options=st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.3, 1.0, 2.0]),
        top_k=st.sampled_from([0, 0, 3, 12, 100]),
        top_p=st.sampled_from([1.0, 0.9, 0.4]),
        min_p=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
        typical_p=st.sampled_from([1.0, 0.9, 0.3, 1e-9]),
        repetition_penalty=st.sampled_from([1.0, 1.4, 0.7]),
        presence_penalty=st.sampled_from([0.0, 0.8, -0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
        penalty_window=st.sampled_from([1, 4, 64]),
        logit_bias=st.dictionaries(st.integers(0, 29), st.sampled_from([-3.0, 0.7, 2.0]), max_size=3),
    ),
)
def test_the_distribution_is_that_of_transformers_processors(
    seed: int, recent: list[int], options: SamplingOptions
) -> None:
    """Checks each token's share of [0, 1): a coin in its middle must draw that token."""
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(seed))
    shares = torch.softmax(transformers_scores(logits, options, recent), 0).numpy()
    is_ordered = options.top_k or options.top_p < 1
    ids = np.argsort(-shares, kind="stable") if is_ordered else np.arange(len(shares))
    middles = np.cumsum(shares[ids]) - shares[ids] / 2
    for token, middle in zip(ids, middles, strict=True):
        if shares[token] > 1e-9:
            assert sample(logits, options, Coin(middle), recent) == token


@given(
    seed=st.integers(0, 10**6),
    recent=st.lists(st.integers(0, 29), max_size=12),
    repetition=st.sampled_from([1.0, 1.4, 5.0]),
    presence=st.sampled_from([0.0, 2.0]),
    bias=st.dictionaries(st.integers(0, 29), st.sampled_from([-9.0, 9.0]), max_size=2),
)
def test_temperature_zero_takes_the_highest_after_bias_and_penalties(
    seed: int, recent: list[int], repetition: float, presence: float, bias: dict[int, float]
) -> None:
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(seed))
    options = SamplingOptions(repetition_penalty=repetition, presence_penalty=presence, logit_bias=bias)
    rng = Rng(5)
    assert sample(logits, options, rng, recent) == int(transformers_scores(logits, options, recent).argmax())
    assert rng.state == 5


def test_repetition_and_presence_count_a_token_once_and_frequency_each_time() -> None:
    logits = torch.tensor([2.0, 1.0])
    for once in (SamplingOptions(repetition_penalty=1.9), SamplingOptions(presence_penalty=0.9)):
        assert sample(logits, once, Rng(0), [0] * 9) == 0
    assert sample(logits, SamplingOptions(frequency_penalty=0.9), Rng(0), [0]) == 0
    assert sample(logits, SamplingOptions(frequency_penalty=0.9), Rng(0), [0, 0]) == 1
    assert sample(logits, SamplingOptions(frequency_penalty=0.9, penalty_window=2), Rng(0), [0, 0, 1]) == 0


def test_min_p_keeps_what_is_exactly_p_times_as_likely() -> None:
    logits = torch.tensor([0.0, -1.0, -2.0])
    draws = {sample(logits, SamplingOptions(1.0, min_p=float(np.exp(-1.0))), Rng(seed)) for seed in range(200)}
    assert draws == {0, 1}
    assert {sample(logits, SamplingOptions(1.0, min_p=1.0), Rng(seed)) for seed in range(50)} == {0}


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(1.0), SamplingOptions(0.7, 3, 0.9)])
def test_without_bias_and_penalties_logits_are_read_only_once(
    options: SamplingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sampler, "_adjusted")
    assert 0 <= sample(LOGITS, options, Rng(1), [1, 2]) < len(LOGITS)


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(1.0),
        SamplingOptions(1.0, top_k=3),
        SamplingOptions(1.0, top_p=0.5, min_p=0.2),
    ],
)
def test_only_tokens_that_are_allowed_are_drawn(options: SamplingOptions) -> None:
    allowed = np.array([True, False, True, False, True])
    kept = torch.tensor([1.0, 2.0, -1.0])
    for seed in range(100):
        token = sample(LOGITS, options, Rng(seed), allowed=allowed)
        assert token == [0, 2, 4][sample(kept, options, Rng(seed))]


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.integers(0, 50), st.data())
def test_logprobs_are_torchs_log_softmax(values: list[float], k: int, data: st.DataObject) -> None:
    logits = torch.tensor(values)
    token = data.draw(st.integers(0, len(values) - 1))
    expected = torch.log_softmax(logits.double(), 0)
    logprob, top = logprobs(logits, token, k)
    assert logprob == pytest.approx(float(expected[token]), rel=1e-12, abs=1e-12)
    ranked = torch.sort(expected, descending=True, stable=True)
    assert [i for i, _ in top] == torch.sort(logits, descending=True, stable=True).indices[:k].tolist()
    assert [value for _, value in top] == pytest.approx(ranked.values[:k].tolist(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top-k -1"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"min_p": -0.1}, "min-p -0.1 is invalid; give 0 .all. to 1"),
        ({"min_p": 1.1}, "min-p 1.1"),
        ({"repetition_penalty": 0.0}, "repetition-penalty 0.0 is invalid; give more than 0, where 1 is none"),
        ({"repetition_penalty": float("inf")}, "repetition-penalty inf"),
        ({"presence_penalty": float("nan")}, "presence-penalty nan is invalid; give a finite number"),
        ({"frequency_penalty": -float("inf")}, "frequency-penalty -inf is invalid; give a finite number"),
        ({"typical_p": 0.0}, "typical-p 0.0 is invalid; give more than 0, up to 1"),
        ({"dry_multiplier": -1.0}, "dry-multiplier -1.0 is invalid; give 0 .none. or more"),
        ({"dry_base": 0.5}, "dry-base 0.5 is invalid; give 1 to 100"),
        ({"dry_allowed_length": 0}, "dry-allowed-length 0 is invalid; give 1 or more"),
        ({"dry_window": -1}, "dry-window -1 is invalid; give 0 or more"),
        ({"mirostat": 3}, "mirostat 3 is invalid; give 0 .none., 1 or 2"),
        ({"mirostat_tau": -1.0}, "mirostat-tau -1.0 is invalid; give 0 or more"),
        ({"mirostat_eta": float("inf")}, "mirostat-eta inf is invalid; give 0 or more"),
        ({"penalty_window": 0}, "penalty-window 0 is invalid; give 1 or more"),
        ({"logit_bias": {-1: 2.0}}, "logit-bias -1=2.0 is invalid; give an id of 0 or more and a finite number"),
        ({"logit_bias": {5: float("inf")}}, "logit-bias 5=inf"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingOptions(**options)  # type: ignore[arg-type]


def penalties_of_dry(text: list[int], options: SamplingOptions) -> list[float]:
    """What DRY takes from each token's logit, found by comparing what precedes each earlier place of the token with the
    end of the text, one token at a time.
    """
    window = text if options.dry_window is None else text[len(text) - min(options.dry_window, len(text)) :]
    taken = [0.0] * 6
    for place, token in enumerate(window):
        length = 0
        while length < place and window[place - 1 - length] == window[-1 - length] not in options.dry_breakers:
            length += 1
        if length >= options.dry_allowed_length:
            penalty = options.dry_multiplier * options.dry_base ** (length - options.dry_allowed_length)
            taken[token] = max(taken[token], penalty)
    return taken


@given(
    text=st.lists(st.integers(0, 3), max_size=30),
    multiplier=st.sampled_from([0.5, 2.0]),
    allowed_length=st.integers(1, 4),
    window=st.sampled_from([None, 0, 1, 7, 100]),
    breakers=st.sampled_from([frozenset[int](), frozenset({2})]),
)
def test_dry_takes_more_from_a_token_the_longer_a_repetition_it_would_continue(
    text: list[int], multiplier: float, allowed_length: int, window: int | None, breakers: frozenset[int]
) -> None:
    options = SamplingOptions(
        dry_multiplier=multiplier, dry_allowed_length=allowed_length, dry_window=window, dry_breakers=breakers
    )
    logits = torch.linspace(1, 2, 6)
    scores = sampler._adjusted(logits.numpy(), options, text, None)
    assert scores.tolist() == pytest.approx((logits.double() - torch.tensor(penalties_of_dry(text, options))).tolist())


def zipf(size: int, exponent: float) -> Tensor:
    """Logits whose probabilities follow Zipf's law."""
    return -exponent * torch.log(torch.arange(1, size + 1, dtype=torch.float64)).float()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("target", [2.0, 4.0])
def test_mirostat_keeps_the_mean_information_at_its_target(version: int, target: float) -> None:
    options = SamplingOptions(1.0, mirostat=version, mirostat_tau=target)
    logits, rng, state = zipf(2000, 1.1), Rng(1), Mirostat(options)
    seen = list[float]()
    for _ in range(2000):
        kept = state.kept(torch.softmax(logits.double(), 0).numpy())
        token = sample(logits, options, rng, mirostat=state)
        assert token < kept
        seen.append(-float(torch.log_softmax(logits[:kept].double(), 0)[token]) / np.log(2))
    assert np.mean(seen[200:]) == pytest.approx(target, abs=0.1)


@given(st.floats(0.2, 3), st.integers(2, 400), st.floats(0.1, 12))
def test_mirostats_first_version_keeps_as_many_tokens_as_its_publication_says(
    exponent: float, size: int, limit: float
) -> None:
    state = Mirostat(SamplingOptions(mirostat=1))
    state.limit = limit
    excess = exponent - 1
    share = (1 - size**-excess) / excess if abs(excess) > 1e-6 else np.log(size)
    expected = (2**limit / share) ** (1 / exponent)
    found = state.kept(torch.softmax(zipf(size, exponent).double(), 0).numpy())
    assert found == pytest.approx(min(max(expected, 1), size), rel=0.01, abs=1)


def test_mirostat_and_typical_sampling_take_the_likeliest_at_temperature_zero_and_among_one() -> None:
    for version in (1, 2):
        options = SamplingOptions(mirostat=version)
        assert sample(LOGITS, options, Rng(0), mirostat=Mirostat(options)) == 1
        warm = SamplingOptions(1.0, mirostat=version)
        allowed = np.array([False, False, True, False, False])
        assert sample(LOGITS, warm, Rng(0), allowed=allowed, mirostat=Mirostat(warm)) == 2
    allowed = np.array([False, False, True, False, False])
    assert sample(LOGITS, SamplingOptions(1.0, typical_p=0.5), Rng(0), allowed=allowed) == 2
