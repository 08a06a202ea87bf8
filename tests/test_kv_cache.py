import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.trace import GraphOptions, signature
from model.errors import InputError
from runtime.kv_cache import KVCache
from tests.conftest import TOY

CAPACITY = 12


def cache() -> KVCache:
    return KVCache(signature(TOY, "decode", 1, GraphOptions(CAPACITY, 1)), CAPACITY)


def rows(length: int, value: float) -> dict[str, torch.Tensor]:
    """New rows of every layer; each holds its own value."""
    shape = (TOY.n_kv_heads, length, TOY.head_dim)
    names = [f"{kind}_rows.{layer}" for kind in "kv" for layer in range(TOY.n_layers)]
    return {name: torch.full(shape, value + i / 8) for i, name in enumerate(names)}


def test_buffers_are_the_graphs_inputs_and_counted_in_bytes() -> None:
    buffers = cache().buffers
    assert list(buffers) == ["k_cache.0", "k_cache.1", "v_cache.0", "v_cache.1"]
    assert {tuple(buffer.shape) for buffer in buffers.values()} == {(TOY.n_kv_heads, CAPACITY, TOY.head_dim)}
    assert cache().nbytes == 4 * TOY.n_kv_heads * CAPACITY * TOY.head_dim * 4


@given(
    st.lists(st.one_of(st.tuples(st.just("add"), st.integers(0, 5)), st.tuples(st.just("back"), st.integers(-1, 13))))
)
def test_any_order_of_commits_and_rewinds_holds_what_a_list_would(operations: list[tuple[str, int]]) -> None:
    subject, expected, stamp = cache(), list[float](), 0.0
    buffers = {name: id(buffer) for name, buffer in subject.buffers.items()}
    for operation, count in operations:
        if operation == "add" and 1 <= count <= CAPACITY - len(expected):
            stamp += 1
            assert subject.plan(count) == len(expected)
            subject.commit(rows(count + 2, stamp), count)  # two rows of padding, which must not arrive
            expected += [stamp] * count
        elif operation == "back" and 0 <= count <= len(expected):
            subject.rewind(count)
            del expected[count:]
        else:
            with pytest.raises(InputError, match=str(count)):
                subject.plan(count) if operation == "add" else subject.rewind(count)
        assert subject.position == len(expected)
        for i, buffer in enumerate(subject.buffers.values()):
            filled = buffer[0, : subject.position, 0].tolist()
            assert filled == [value + i / 8 for value in expected]
    assert {name: id(buffer) for name, buffer in subject.buffers.items()} == buffers, "allocated once"


def test_what_does_not_fit_is_refused_with_all_three_numbers() -> None:
    subject = cache()
    subject.commit(rows(10, 1), 10)
    with pytest.raises(InputError, match="3 tokens do not fit behind the 10 in the cache, which holds 12"):
        subject.plan(3)
