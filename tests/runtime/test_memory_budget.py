import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from runtime.engine.memory_budget import choose_resident


@given(st.lists(st.integers(1, 100), min_size=1, max_size=9), st.integers(0, 900))
def test_resident_shards_leave_room_for_each_other_shard(sizes: list[int], room: int) -> None:
    try:
        found = choose_resident(sizes, room)
    except InputError:
        assert max(sizes) > room
        return
    others = [size for number, size in enumerate(sizes) if number not in found]
    taken = sum(sizes[number] for number in found)
    assert taken + max(others, default=0) <= room
    for number in set(range(len(sizes))) - found:
        rest = [size for other, size in enumerate(sizes) if other not in found | {number}]
        assert taken + sizes[number] + max(rest, default=0) > room, f"{number} could stay, too"


def test_the_first_shard_stays_and_then_the_largest() -> None:
    assert choose_resident([5, 9, 4, 8], 26) == {0, 1, 2, 3}
    assert choose_resident([5, 9, 4, 8], 25) == {0, 1}
    assert choose_resident([5, 9, 4, 8], 14) == {0}
    assert choose_resident([5, 9, 4, 8], 13) == {2}


def test_too_small_a_budget_is_refused_with_the_missing_bytes() -> None:
    with pytest.raises(InputError, match="leaves 30 MB for weights, but shard 2 of 3 needs 50 MB; give 20 MB more"):
        choose_resident([10_000_000, 50_000_000, 20_000_000], 30_000_000)
    with pytest.raises(InputError, match="leaves 0 MB"):
        choose_resident([1_000_000], -5)
