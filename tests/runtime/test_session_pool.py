import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.serving.session_pool import WORTH_COPYING, SessionPool
from tests.conftest import TOY

LONG = [token % 5 for token in range(2 * WORTH_COPYING)]

short = st.lists(st.integers(1, 2), min_size=1, max_size=4)
prompts = st.builds(lambda shared, own: LONG[:shared] + own, st.sampled_from([0, 3, 20, 30]), short)


def run_text(pool: SessionPool, text: list[int]) -> Session:
    """Runs a text in a session of the pool and gives it back."""
    session = pool.take(text)
    session.restart(text)
    pool.give_back(session)
    return session


@given(st.integers(1, 3), st.lists(st.tuples(prompts, st.integers(0, 9)), max_size=12))
def test_a_reused_session_equals_a_new_one(
    toy_program: Program, limit: int, requests: list[tuple[list[int], int]]
) -> None:
    pool, taken = SessionPool(toy_program, limit), list[Session]()
    for prompt, chance in requests:
        while taken and (chance < 5 or not pool.has_room):
            (pool.discard if chance == 9 else pool.give_back)(taken.pop(chance % len(taken)))
        session = pool.take(prompt)
        taken.append(session)
        assert session.tokens == prompt[: session.position]
        assert session.position < len(prompt)
        expected = Session(toy_program).prefill(prompt)
        torch.testing.assert_close(session.restart(prompt), expected, rtol=0, atol=1e-4)
        assert len({id(each) for each in taken}) == len(taken) <= len(pool) <= limit


def test_a_continued_text_keeps_its_session(toy_program: Program) -> None:
    pool = SessionPool(toy_program, 3)
    first_session, other = run_text(pool, [1, 2, 3]), run_text(pool, [7, 8])
    assert first_session is not other
    assert pool.take([1, 2, 3, 4]) is first_session
    assert first_session.tokens == [1, 2, 3]
    assert pool.take([7, 8, 9]) is other


def test_a_new_session_copies_a_long_prefix_and_leaves_the_other_unchanged(toy_program: Program) -> None:
    pool = SessionPool(toy_program, 2)
    first = run_text(pool, [*LONG, 5])
    second = pool.take([*LONG[:WORTH_COPYING], 6, 7])
    assert second is not first
    assert second.tokens == LONG[:WORTH_COPYING]
    assert first.tokens == [*LONG, 5]


def test_a_session_in_use_is_copied_too(toy_program: Program) -> None:
    pool = SessionPool(toy_program, 2)
    first = pool.take(LONG)
    first.restart(LONG)
    assert pool.take([*LONG, 1]).tokens == LONG
    assert not pool.has_room


def test_with_no_room_a_session_in_use_is_copied_over_the_one_used_longest_ago(toy_program: Program) -> None:
    pool = SessionPool(toy_program, 3)
    older, newer = run_text(pool, [7, 8, 9]), run_text(pool, [*LONG[:3], 9])
    first = pool.take([6])
    first.restart(LONG)
    second = pool.take([*LONG, 1])
    assert second.tokens == LONG
    assert second not in (older, newer, first)
    assert first.tokens == LONG
    assert len(pool) == 3
    assert pool.take([*LONG[:3], 9, 9]) is newer


def test_with_no_room_the_longest_prefix_wins_and_then_the_least_recently_used(toy_program: Program) -> None:
    pool = SessionPool(toy_program, 2)
    older, newer = run_text(pool, [1, 2, 3]), run_text(pool, [4, 5, 6])
    assert pool.take([4, 5, 9]) is newer
    pool.give_back(newer)
    assert pool.take([9, 9]) is older


def test_a_discarded_session_leaves_its_place(toy_program: Program) -> None:
    pool = SessionPool(toy_program, 1)
    session = pool.take([1, 2])
    pool.discard(session)
    assert len(pool) == 0
    assert pool.take([1, 2]) is not session


def test_no_sessions_at_all_are_refused(toy_program: Program) -> None:
    with pytest.raises(InputError, match="--sessions 0 is invalid; give 1 or more"):
        SessionPool(toy_program, 0)
    assert TOY.context > len(LONG) + 4
