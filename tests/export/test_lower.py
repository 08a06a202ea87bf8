import functools
from dataclasses import replace

import torch

from export.lowering.code import Code, Delegate, Value
from export.lowering.lower import Codes, lower
from export.lowering.trace import GraphOptions, signatures
from export.weights.formats.integer import BYTE
from export.weights.scheme import SCHEMES
from tests.conftest import TOY

CONFIG = replace(TOY, hidden_dim=64)
METHODS = signatures(CONFIG, GraphOptions(48, 7))


@functools.cache
def lowered(quantize: str) -> Codes:
    """Lowers TOY, widened so that rows are whole groups, without fused attention."""
    return lower(CONFIG, [METHODS], "xnnpack", SCHEMES[quantize])


def only(code: Code) -> Delegate:
    """Returns the delegate of a piece that a backend takes as a whole."""
    (call,) = code.calls
    assert isinstance(call.target, Delegate)
    return call.target


def test_each_kind_of_piece_is_lowered_once_per_method() -> None:
    codes = lowered("fp32")
    assert set(codes) == {(method, name) for method in ("decode", "prefill") for name in ("block", "head")}
    names = {"attention.wq", "attention.wk", "attention.wv", "attention.wo"}
    names |= {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}
    for code in codes.values():
        assert only(code).backend_id == "XnnpackBackend"
        assert all(only(code).payload.count(part.key.encode()) == 1 for part in only(code).data)
    assert {part.parameter for part in only(codes["decode", "block"]).data} == {f"{name}.weight" for name in names}
    assert {part.parameter for part in only(codes["prefill", "head"]).data} == {"output.weight"}


def test_a_segment_is_lowered_once_for_all_lengths() -> None:
    codes = lower(TOY, [signatures(TOY, GraphOptions(48, 7, "fused"))], "xnnpack", SCHEMES["fp32"])
    assert set(codes) == {("forward", kind) for kind in ("after", "before after", "before head")}
    joint = codes["forward", "before after"]
    sides = {part.parameter.split(".")[0] for part in only(joint).data}
    assert (sides, len(joint.results)) == ({"before", "after"}, 4)
    assert inputs(joint) == {0, 1}


def test_shards_share_the_code_at_their_ends() -> None:
    """Three shards of three blocks need four kinds of pieces, the same number as any other number of shards."""
    config, graph = replace(TOY, n_layers=9), GraphOptions(48, 7, "fused")
    shards = [signatures(config, graph, span=range(start, start + 3)) for start in (0, 3, 6)]
    assert {kind for _, kind in lower(config, shards, "xnnpack", SCHEMES["fp32"])} == {
        "after", "before after", "before", "before head",
    }  # fmt: skip


def test_no_cache_is_copied() -> None:
    """A cache must be an argument of the delegate itself, not the result of expand, cat, clone or reshape."""
    code = lowered("fp32")["prefill", "block"]
    assert inputs(code) == set(range(6))
    shapes = dict(zip(code.calls[0].arguments, shapes_of(only(code)), strict=True))
    k_cache, v_cache = 4, 5  # after x, cos, sin and mask
    assert shapes[Value("input", k_cache)] == shapes[Value("input", v_cache)] == (2, 48, 8)


def inputs(code: Code) -> set[int]:
    return {value for call in code.calls for kind, value in call.arguments if kind == "input"}


def shapes_of(code: Delegate) -> list[tuple[int, ...]]:
    return [tuple(node.meta["val"].shape) for node in code.stand_in.graph.nodes if node.op == "placeholder"]


def test_portable_lowers_no_block_by_itself() -> None:
    assert lower(TOY, [METHODS], "portable", SCHEMES["fp32"]) == {}


def test_8_bit_weights_are_stored_with_one_scale_per_row() -> None:
    code = lowered("8da8w")["decode", "head"]
    (_, codes), (_, scales) = BYTE.parts(BYTE.stored(torch.randn(TOY.vocab_size, TOY.dim), "nearest"))
    assert [part.nbytes for part in only(code).data] == [codes.nbytes, scales.nbytes]
    assert scales.dtype == torch.float32


def test_a_quantised_weight_has_its_scales_as_a_part() -> None:
    code = lowered("8da4w")["decode", "head"]
    rows, columns = TOY.vocab_size, TOY.dim
    assert [(part.parameter, part.number, part.nbytes) for part in only(code).data] == [
        ("output.weight", 0, rows * columns // 2),
        ("output.weight", 1, rows * columns // 32 * 2),
    ]


def test_products_of_the_same_input_by_blocks_are_one_call() -> None:
    graph = GraphOptions(48, 7, "fused")
    code = lower(CONFIG, [signatures(CONFIG, graph)], "xnnpack", SCHEMES["q4_1"])["forward", "before after"]
    calls = [call for call in code.calls if isinstance(call.target, str)]
    weights = {
        call.target: [value for kind, value in call.arguments if kind == "parameter" and value.endswith("weight")]
        for call in calls
    }
    assert len(calls) == 4
    assert weights == {
        "llama_pte.linear.default": ["before.feed_forward.w2.weight"],  # wo has the same name, and comes before
        "llama_pte.linear2.default": ["before.feed_forward.w1.weight", "before.feed_forward.w3.weight"],
        "llama_pte.linear3.default": [f"after.attention.{name}.weight" for name in ("wq", "wk", "wv")],
    }
    last = code.calls.index(calls[-1])
    assert code.results[:3] == tuple(Value("result", (last, i)) for i in range(3))
