from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.lowering.trace import GraphOptions, signature
from model.errors import InputError
from runtime.engine.kv_cache import KVCache
from tests.conftest import TOY

CAPACITY = 12
RING = 3


def cache(window: int | None = None) -> KVCache:
    """Returns a cache of two layers, of which the second may have a sliding window."""
    config = replace(TOY, sliding_window=window, local_layers=(1,)) if window else TOY
    return KVCache(signature(config, "decode", 1, GraphOptions(CAPACITY, 1)), CAPACITY)


def rows(length: int, value: Callable[[int], float]) -> dict[str, torch.Tensor]:
    """Returns new rows for every layer; row i holds value(i), and a different offset in each tensor."""
    ramp = torch.tensor([value(i) for i in range(length)]).view(1, length, 1).expand(TOY.n_kv_heads, -1, TOY.head_dim)
    names = [f"{kind}_rows.{layer}" for kind in "kv" for layer in range(TOY.n_layers)]
    return {name: ramp + i / 8 for i, name in enumerate(names)}


def test_buffers_are_the_graphs_inputs_and_counted_in_bytes() -> None:
    buffers = cache().buffers
    assert sorted(buffers) == ["k_cache.0", "k_cache.1", "v_cache.0", "v_cache.1"]
    assert {tuple(buffer.shape) for buffer in buffers.values()} == {(TOY.n_kv_heads, CAPACITY, TOY.head_dim)}
    assert all(buffer.is_contiguous() for buffer in buffers.values())
    assert cache().filled_bytes(CAPACITY) == 4 * TOY.n_kv_heads * CAPACITY * TOY.head_dim * 4
    assert cache(RING).filled_bytes(CAPACITY) == 2 * TOY.n_kv_heads * (CAPACITY + RING) * TOY.head_dim * 4


OPERATIONS = st.lists(
    st.one_of(st.tuples(st.just("add"), st.integers(0, 9)), st.tuples(st.just("back"), st.integers(-1, 13))),
    max_size=12,
)


@given(OPERATIONS, st.sampled_from([None, 1, 2, RING, 5, CAPACITY, CAPACITY + 1]))
def test_any_order_of_commits_and_rewinds_equals_a_list(operations: list[tuple[str, int]], window: int | None) -> None:
    subject, expected, stamp = cache(window), list[float](), 0
    ring = min(window or CAPACITY, CAPACITY)
    places = {name: buffer.data_ptr() for name, buffer in subject.buffers.items()}
    furthest = 0  # largest length since the text was last empty; a ring keeps the `ring` rows before it
    for operation, count in operations:
        if operation == "add" and 1 <= count <= CAPACITY - len(expected):
            stamp += 100
            assert subject.plan(count) == len(expected)
            # Two rows of padding, which must not be stored.
            subject.commit(rows(count + 2, lambda i, stamp=stamp: stamp + i), count)
            expected += [stamp + i for i in range(count)]
        elif operation == "back" and 0 <= count <= len(expected) and _seen(count, ring) >= furthest - ring:
            subject.rewind(count)
            del expected[count:]
        else:
            with pytest.raises(InputError, match=str(count)):
                subject.plan(count) if operation == "add" else subject.rewind(count)
        furthest = max(furthest, len(expected)) if expected else 0
        assert subject.position == len(expected)
        for name, buffer in subject.buffers.items():
            slots = ring if name.endswith(".1") else CAPACITY
            assert buffer.shape[1] == slots
            number = rows(1, lambda _: 0)[name.replace("cache", "rows")][0, 0, 0]
            for position in range(max(0, len(expected) - slots + 1), len(expected)):  # seen by the next token
                assert (buffer[:, position % slots] == expected[position] + number).all()
    assert {name: buffer.data_ptr() for name, buffer in subject.buffers.items()} == places, "allocated once"


def _seen(position: int, window: int) -> int:
    """Returns the first cached position that a token at `position` attends to, or CAPACITY if there is none."""
    return max(position - window + 1, 0) if position else CAPACITY


def test_rows_that_do_not_fit_are_refused_with_all_three_numbers() -> None:
    subject = cache()
    subject.commit(rows(10, float), 10)
    with pytest.raises(InputError, match="3 tokens do not fit after the 10 in the cache, which holds 12"):
        subject.plan(3)


def test_a_ring_refuses_to_rewind_too_far() -> None:
    subject = cache(RING)
    subject.commit(rows(9, float), 9)
    message = "position 5: the model sees 3 positions at a time, .* rewind to 8 or later, or to 0"
    with pytest.raises(InputError, match=message):
        subject.rewind(5)
    subject.rewind(8)
    with pytest.raises(InputError, match="rewind to 8 or later"):
        subject.rewind(7)
    subject.rewind(0)
    subject.commit(rows(2, float), 2)
    subject.rewind(1)
