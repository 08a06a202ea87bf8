import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.alibi import alibi_slopes
from preproc import mask
from preproc.mask import HIDDEN, CausalMask
from tests.support.kinds import KINDS


def expected(position: int, length: int, capacity: int, window: int, slope: float) -> list[list[float]]:
    """Computes the expected mask element by element."""
    rows = []
    for new in range(position, position + length):
        row = [HIDDEN] * (capacity + length)
        for seen in range(max(0, new - window + 1), new + 1):
            column = seen % capacity if seen < position else capacity + seen - position
            row[column] = -slope * (new - seen)
        rows.append(row)
    return rows


@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 12))
def test_a_row_attends_to_the_cache_and_the_new_rows_up_to_itself(position: int, length: int, spare: int) -> None:
    rows = mask.causal(position, length, position + spare)
    assert rows.tolist() == expected(position, length, position + spare, 99, 0)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 12))
def test_the_mask_of_a_window_fits_its_ring(position: int, length: int, window: int) -> None:
    assert mask.causal(position, length, window, window).tolist() == expected(position, length, window, window, 0)


@given(st.integers(0, 9), st.integers(1, 6), st.integers(0, 5), st.integers(1, 20))
def test_alibi_subtracts_in_proportion_to_distance(position: int, length: int, spare: int, window: int) -> None:
    capacity, slopes = position + spare, torch.tensor([0.5, 0.125])
    values = mask.alibi(position, length, capacity, slopes, window)
    assert values.tolist() == [expected(position, length, capacity, window, slope) for slope in slopes.tolist()]


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_outside_the_cache_is_refused(position: int) -> None:
    with pytest.raises(ValueError, match=f"position {position} is outside the cache's capacity of 8"):
        mask.causal(position, 1, 8)


MOVES = st.lists(st.integers(0, 20), max_size=8)


@given(st.integers(1, 6), st.integers(1, 22), st.booleans(), MOVES)
def test_a_moved_mask_equals_a_new_one(length: int, window: int, biased: bool, moves: list[int]) -> None:
    slopes = torch.tensor([0.3, 0.7, 1 / 3]) if biased else torch.zeros(0)
    plain, ring = CausalMask(length, 20, None, slopes), CausalMask(length, min(20, window), window, slopes)
    places = plain.values.data_ptr(), ring.values.data_ptr()
    for position in moves:
        plain.move(position)
        ring.move(position)
        weighed = slopes if biased else torch.zeros(1)
        assert torch.equal(plain.values, mask.alibi(position, length, 20, weighed))
        assert torch.equal(ring.values, mask.alibi(position, length, min(20, window), weighed, window))
    assert (plain.values.data_ptr(), ring.values.data_ptr()) == places, "allocated once"


def test_slopes_of_other_than_a_power_of_two_heads_are_every_other_one_first() -> None:
    slopes = alibi_slopes(KINDS["alibi"].config)  # six heads
    assert slopes.tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
