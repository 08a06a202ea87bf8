from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.planning.sharding import Sharding, block_bytes
from export.weights.scheme import SCHEMES, matrices
from model.errors import InputError
from tests.conftest import TOY

FP32 = SCHEMES["fp32"]


@given(st.integers(1, 12), st.data())
def test_shards_hold_every_block_once_in_order(n_layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n_layers))
    spans = Sharding(count).spans(replace(TOY, n_layers=n_layers), FP32)
    assert len(spans) == count
    assert [layer for span in spans for layer in span] == list(range(n_layers))


def test_shards_are_balanced_with_embedding_and_head() -> None:
    """In a model whose 12 blocks are as large as 4 embeddings, the first and last shard have fewer blocks."""
    config = replace(TOY, n_layers=12, vocab_size=4096, tied=False)
    sizes = block_bytes(config, FP32)
    outside = 4 * config.vocab_size * config.dim
    assert (sizes[0] - outside, sizes[-1] - outside) == (sizes[1], sizes[1])
    assert sum(sizes) == 4 * sum(rows * columns for rows, columns in matrices(config).values()) + outside
    spans = Sharding(3).spans(config, FP32)
    largest = max(sum(sizes[layer] for layer in span) for span in spans)
    for first in range(1, 11):
        for second in range(first + 1, 12):
            assert largest <= max(sum(sizes[:first]), sum(sizes[first:second]), sum(sizes[second:]))


def test_as_few_shards_as_a_size_allows() -> None:
    config = replace(TOY, n_layers=6)
    sizes = block_bytes(config, FP32)
    assert Sharding(shard_bytes=sum(sizes)).spans(config, FP32) == (range(6),)
    assert len(Sharding(shard_bytes=sum(sizes) - 1).spans(config, FP32)) == 2
    assert len(Sharding(shard_bytes=max(sizes)).spans(config, FP32)) <= 6
    with pytest.raises(
        InputError, match=f"--shard-bytes {max(sizes) - 1} is too small for the largest block.*{max(sizes)}"
    ):
        Sharding(shard_bytes=max(sizes) - 1).spans(config, FP32)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Sharding(0), "--shards 0 is invalid"),
        (lambda: Sharding(2, 100), "--shards and --shard-bytes cannot be combined"),
        (lambda: Sharding(3).spans(TOY, FP32), "--shards 3 is more than the model's 2 blocks"),
    ],
)
def test_impossible_cuts_are_refused(make: object, problem: str) -> None:
    assert callable(make)
    with pytest.raises(InputError, match=problem):
        make()
