import torch

from export.trace import GraphOptions, signature, trace
from tests.conftest import TOY, toy_model


def test_each_method_has_the_signature_that_is_written_down() -> None:
    traced = trace(toy_model(), GraphOptions(48, 7))
    assert list(traced.programs) == [method.name for method in traced.methods] == ["decode", "prefill"]
    for method in traced.methods:
        inputs = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in method.inputs]
        outputs = traced.programs[method.name].module()(*inputs)
        assert [tuple(output.shape) for output in outputs] == [spec.shape for spec in method.outputs]
        assert {str(output.dtype) for output in outputs} == {"torch.float32"}


def test_a_chunk_of_one_needs_no_prefill_method() -> None:
    traced = trace(toy_model(), GraphOptions(16, 1))
    assert [method.name for method in traced.methods] == ["decode"]


def test_nothing_in_the_graph_depends_on_a_value() -> None:
    """The same graph serves every position: no branch, no symbolic size, no constant but weights."""
    program = trace(toy_model(), GraphOptions(48, 7)).programs["prefill"]
    assert not program.constants
    assert not program.range_constraints
    assert "sym_" not in str(program.graph)


def test_names_say_role_and_layer() -> None:
    method = signature(TOY, "decode", 1, GraphOptions(48, 1))
    assert [spec.name for spec in method.inputs] == [
        *("tokens", "cos", "sin", "mask", "select"),
        *("k_cache.0", "k_cache.1", "v_cache.0", "v_cache.1"),
    ]
    assert [spec.name for spec in method.outputs] == ["logits", "k_rows.0", "k_rows.1", "v_rows.0", "v_rows.1"]
