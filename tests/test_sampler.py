import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from runtime.sampler import Rng, SamplingOptions, sample

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
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top-k -1"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.5}, "top-p 1.5"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingOptions(**options)  # type: ignore[arg-type]
