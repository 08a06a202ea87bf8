import pytest
from hypothesis import given
from hypothesis import strategies as st

from preproc import mask


@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 12))
def test_a_row_sees_what_is_cached_and_the_new_rows_up_to_itself(position: int, length: int, spare: int) -> None:
    capacity = position + spare
    rows = mask.causal(position, length, capacity)
    assert rows.shape == (length, capacity + length)
    for i, row in enumerate(rows.tolist()):
        visible = {column for column, value in enumerate(row) if value == 0}
        assert visible == set(range(position)) | set(range(capacity, capacity + i + 1))
        assert set(row) <= {0.0, mask.HIDDEN}


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_outside_the_cache_is_refused(position: int) -> None:
    with pytest.raises(ValueError, match=f"position {position} is outside the cache's capacity of 8"):
        mask.causal(position, 1, 8)
