from dataclasses import replace

import torch

from export.lowering.trace import GraphOptions, kinds, parameter_name, pieces, signature, signatures, trace
from export.weights.formats.float32 import FLOAT
from export.weights.formats.integer import BYTE
from export.weights.scheme import SCHEMES
from model.fused_attention import FusedLlama
from tests.conftest import TOY, random_model, toy_model


def test_each_method_has_its_signature() -> None:
    options = [
        GraphOptions(48, 7),
        GraphOptions(16, 1),
        GraphOptions(9, 3, kv_cache=False),
        GraphOptions(9, 3, hidden_states=True),
        GraphOptions(9, 1, "fused"),
    ]
    names = [["decode", "prefill"], ["decode"], ["forward"], ["decode", "prefill"], ["forward"]]
    for option, expected in zip(options, names, strict=True):
        methods = signatures(TOY, option)
        model = toy_model()
        programs = trace(FusedLlama(model) if methods[0].is_fused else model, methods)
        assert list(programs) == [method.name for method in methods] == expected
        for method in methods:
            inputs = [spec.zeros(method.max_length) for spec in method.inputs]
            outputs = programs[method.name].module()(*inputs)
            assert [tuple(output.shape) for output in outputs] == [spec.shape for spec in method.outputs]
            assert {str(output.dtype) for output in outputs} == {"torch.float32"}


def test_the_graph_does_not_depend_on_values() -> None:
    """One graph must serve every position: it has no branch, no symbolic size, and no constant but weights."""
    program = trace(toy_model(), signatures(TOY, GraphOptions(48, 7)))["prefill"]
    assert not program.constants
    assert not program.range_constraints
    assert "sym_" not in str(program.graph)


def test_where_attention_is_fused_one_method_takes_any_length() -> None:
    (method,) = signatures(TOY, GraphOptions(48, 7, "fused", hidden_states=True))
    assert (method.min_length, method.max_length) == (1, 7)
    program = trace(FusedLlama(toy_model()), [method])["forward"].module()
    for length in (1, 2, 7):
        outputs = program(*(spec.zeros(length) for spec in method.inputs))
        assert [tuple(output.shape) for output in outputs] == [spec.sizes(length) for spec in method.outputs]


def test_names_contain_role_and_layer() -> None:
    method = signature(TOY, "decode", 1, GraphOptions(48, 1))
    assert [spec.name for spec in method.inputs] == [
        *("tokens", "cos", "sin", "mask", "select"),
        *("k_cache.0", "k_cache.1", "v_cache.0", "v_cache.1"),
    ]
    assert [spec.name for spec in method.outputs] == ["logits", "k_rows.0", "k_rows.1", "v_rows.0", "v_rows.1"]
    (fused,) = signatures(TOY, GraphOptions(48, 7, "fused"))
    assert [spec.name for spec in fused.inputs[:5]] == ["tokens", "cos", "sin", "start", "select"]


def test_a_local_block_has_a_ring_and_a_mask_of_the_windows_size() -> None:
    config = replace(TOY, n_layers=3, sliding_window=8, local_layers=(0, 2))
    shapes = {spec.name: spec.shape for spec in signature(config, "prefill", 5, GraphOptions(48, 5)).inputs}
    assert [shapes[f"k_cache.{layer}"][1] for layer in range(3)] == [8, 48, 8]
    assert (shapes["local_mask"], shapes["mask"]) == ((1, 5, 13), (1, 5, 53))


def test_masks_of_heads_and_learned_positions_are_inputs() -> None:
    alibi = signature(replace(TOY, positions="alibi"), "decode", 1, GraphOptions(48, 1)).inputs
    assert {spec.name: spec.shape for spec in alibi}["mask"] == (TOY.n_heads, 1, 49)
    learned = signature(replace(TOY, positions="learned"), "decode", 1, GraphOptions(48, 1)).inputs
    assert [spec.name for spec in learned[:3]] == ["tokens", "positions", "mask"]


def test_hidden_states_are_the_last_blocks_normalised() -> None:
    model = random_model(TOY)
    (method,) = signatures(TOY, GraphOptions(9, 3, kv_cache=False, hidden_states=True))
    inputs = {spec.name: spec.zeros(method.max_length) for spec in method.inputs}
    inputs["select"][0, 0, 4] = 1
    logits, hidden = trace(model, [method])["forward"].module()(*inputs.values())
    torch.testing.assert_close(logits[0, 0], model.head.output(hidden[0, 4]))


def test_blocks_of_one_kind_share_a_graph() -> None:
    config = replace(TOY, n_layers=5, sliding_window=8, local_layers=(1, 3), nope_layers=(3, 4))
    assert pieces(config, range(5), fused=False) == {
        "layers.0": "block",
        "layers.1": "block local",
        "layers.2": "block",
        "layers.3": "block local unrotated",
        "layers.4": "block unrotated",
        "head": "head",
    }
    assert pieces(config, range(1, 3), fused=False) == {"layers.1": "block local", "layers.2": "block"}


def test_segments_differ_only_at_the_ends_and_by_their_formats() -> None:
    config = replace(TOY, n_layers=5, sliding_window=8, local_layers=(1, 3))
    (method,) = signatures(config, GraphOptions(48, 7, "fused"))
    others = {"layers.3": BYTE, "layers.1.attention.wv.weight": FLOAT}
    scheme = replace(SCHEMES["8da4w"], others=others)
    wide = ("feed_forward.w1", "feed_forward.w3")  # w2 has 8 bits everywhere, because its rows are not whole groups
    bytes_in_block = {
        "after": ", ".join(f"after.attention.{name} in 8 bits a row" for name in ("wq", "wk", "wv")),
        "before": ", ".join(f"before.{name} in 8 bits a row" for name in ("attention.wo", *wide)),
    }
    assert list(kinds(config, method, scheme).values()) == [
        "after",
        "before after, after.attention.wv in float32",
        "before after",
        f"before after, {bytes_in_block['after']}",
        f"before after, {bytes_in_block['before']}",
        "before head",
    ]
    (method,) = signatures(config, GraphOptions(48, 7, "fused"), span=range(3, 4))
    assert kinds(config, method, scheme) == {
        "segments.3": f"after, {bytes_in_block['after']}",
        "segments.4": f"before, {bytes_in_block['before']}",
    }


def test_names_of_parameters_are_the_models() -> None:
    names = [parameter_name(TOY, "segments.1", f"{side}.ffn_norm.weight") for side in ("before", "after")]
    assert names == ["layers.0.ffn_norm.weight", "layers.1.ffn_norm.weight"]
    assert parameter_name(TOY, "segments.2", "after.output.weight") == "head.output.weight"
