from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.lowering.slices import SlicedSource, kv_heads
from export.planning.sharding import Sharding
from export.weights.formats.integer import BYTE
from export.weights.scheme import SCHEMES, Scheme, adjusted, matrices
from export.weights.source import WeightSource
from model.config import ModelConfig
from model.errors import InputError
from runtime.pte.parts import join_parts
from tests.conftest import planned, random_model
from tests.support.slices import GRAPH, GROUPED, UNUSUAL, in_slices, metadata_of

WIDE = replace(GROUPED, n_heads=16, n_kv_heads=8, hidden_dim=128)
UNEVEN = replace(WIDE, n_heads=6, n_kv_heads=3, head_dim=32)


@pytest.mark.parametrize(("config", "count"), [(WIDE, 2), (WIDE, 4), (UNEVEN, 4)])
@pytest.mark.parametrize(
    "scheme",
    [
        SCHEMES["fp32"],
        SCHEMES["8da8w"],
        adjusted(SCHEMES["8da4w"], None, 4, None, "hqq"),
        replace(SCHEMES["8da4w"], others={"layers.1": BYTE}),
    ],
)
def test_joined_slices_equal_the_whole(scheme: Scheme, config: ModelConfig, count: int) -> None:
    whole = WeightSource(config, random_model(config).state_dict(), scheme)
    parts = [SlicedSource(whole, number, count) for number in range(count)]
    for name, shape in {**matrices(config), "tok_embeddings.weight": (93, 64)}.items():
        axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
        found = torch.cat([_values(part.stored(name)) for part in parts], dim=axis)
        real, padding = found.tensor_split([shape[axis]], dim=axis)
        torch.testing.assert_close(real, _values(whole.stored(name)), atol=0, rtol=0)
        assert not padding.any()


def test_the_slices_of_biases_and_norms_are_stored_as_the_weights_are() -> None:
    whole = WeightSource(UNUSUAL["biases"], random_model(UNUSUAL["biases"]).state_dict(), SCHEMES["8da8w"])
    parts = [SlicedSource(whole, number, 2) for number in range(2)]
    bias = "layers.1.feed_forward.w2.bias"
    assert torch.equal(sum(part.stored(bias) for part in parts), whole.weight(bias))
    for name in ("layers.0.attention.wq.bias", "head.output.bias"):
        found = torch.cat([part.stored(name) for part in parts])
        assert torch.equal(found[: len(whole.weight(name))], whole.weight(name))
    assert torch.equal(parts[1].stored("head.norm.weight"), whole.weight("head.norm.weight"))


def _values(matrix: Tensor) -> Tensor:
    return matrix.dequantize() if isinstance(matrix, IntxUnpackedToInt8Tensor) else matrix


def test_each_slice_has_the_kv_heads_of_its_query_heads() -> None:
    def kv_heads_of_slices(n_heads: int, n_kv_heads: int, count: int) -> list[list[int]]:
        config = replace(GROUPED, n_heads=n_heads, n_kv_heads=n_kv_heads)
        return [kv_heads(config, number, count) for number in range(count)]

    assert kv_heads_of_slices(8, 4, 2) == [[0, 1], [2, 3]]
    assert kv_heads_of_slices(8, 2, 4) == [[0], [0], [1], [1]]
    assert kv_heads_of_slices(6, 3, 2) == [[0, 0, 1], [1, 2, 2]]
    assert kv_heads_of_slices(12, 3, 2) == [[0, 0, 1], [1, 2, 2]]
    assert kv_heads_of_slices(6, 3, 4) == [[0], [1], [2], [3]]
    assert kv_heads_of_slices(3, 3, 2) == [[0, 1], [2, 3]]
    assert kv_heads_of_slices(3, 1, 2) == [[0, 0], [0, 1]]


def test_the_halves_of_a_slice_are_its_methods_in_order() -> None:
    for number, methods in enumerate(in_slices(UNUSUAL["norms of heads, caps, partly rotated"], 2).shards):
        assert [method.half for method in methods] == [
            *("embed", "attend.0", "feed.0", "attend.1", "feed.1", "head"),
        ]
        assert {(method.slice, method.slices) for method in methods} == {(number, 2)}
        taken = [[spec.name for spec in method.inputs] for method in methods]
        assert taken[0] == ["tokens"]
        assert taken[1] == ["stream", "cos", "sin", "start", "k_cache.0", "v_cache.0"]
        assert taken[2:] == [
            ["stream"],
            ["stream", "start", "k_cache.1", "v_cache.1"],
            ["stream"],
            ["stream", "select"],
        ]


FOUR = SCHEMES["8da4w"]


@pytest.mark.parametrize(
    ("config", "scheme", "count", "problem"),
    [
        (GROUPED, SCHEMES["fp32"], 9, "--tensor-parallel 9 is more than the model's 8 heads; give at most that"),
        (replace(GROUPED, post_norms=True), FOUR, 2, "is unsupported for a model with norms behind attention"),
        (replace(GROUPED, parallel=True), FOUR, 2, "is unsupported for a model with parallel blocks"),
        (replace(GROUPED, n_experts=2, n_chosen_experts=1), FOUR, 2, "is unsupported for a model with a mixture"),
        (replace(GROUPED, positions="alibi"), FOUR, 2, "is unsupported for a model with ALiBi"),
        (GROUPED, FOUR, 4, "16 columns of layers.0.attention.wo.weight, which is not a multiple of the group size 32"),
        (
            replace(GROUPED, hidden_dim=63, head_dim=32),
            FOUR,
            2,
            "columns of layers.0.feed_forward.w2.weight, which is a multiple of the group size 32, but the model's 63",
        ),
    ],
)
def test_models_that_cannot_be_sliced_are_refused(
    config: ModelConfig, scheme: Scheme, count: int, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        Sharding(slices=count).spans(config, scheme)


def test_slices_and_shards_cannot_be_mixed() -> None:
    sharded = replace(planned(random_model(GROUPED), GRAPH), sharding=Sharding(2))
    first, second = metadata_of(in_slices(GROUPED, 2), 0), metadata_of(sharded, 1)
    with pytest.raises(InputError, match="is from another export than"):
        join_parts({Path("slice"): first, Path("shard"): second})
