import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from export.quantize import SCHEMES, QuantizedEmbedding, as_8_bits, quantize, row_chunks


def test_four_bit_layers_are_torchaos() -> None:
    """Weights to the bit; results up to how the two round activations."""
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(64, 48, bias=True)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    quantize_(
        theirs, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32), weight_scale_dtype=torch.bfloat16)
    )
    quantize(ours, SCHEMES["8da4w"])
    assert torch.equal(ours[0].weight.qdata, theirs[0].weight.qdata)
    assert torch.equal(ours[0].weight.scale, theirs[0].weight.scale)
    x = torch.randn(2, 5, 64)
    step = (x.amax(-1) - x.amin(-1)).max() / 255
    most = float(step * ours[0].weight.dequantize().abs().sum(-1).max())
    torch.testing.assert_close(ours(x), theirs(x), atol=most, rtol=0)


def test_a_large_matrix_is_quantised_in_parts_as_it_would_be_at_once(monkeypatch: object) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 64)
    whole = SCHEMES["8da4w"].linear(weight)
    import export.quantize as module

    most = module._ELEMENTS_AT_ONCE
    module._ELEMENTS_AT_ONCE = 3 * 64
    try:
        parted = SCHEMES["8da4w"].linear(weight)
        assert len(list(row_chunks(weight))) == 14
    finally:
        module._ELEMENTS_AT_ONCE = most
    assert torch.equal(whole.qdata, parted.qdata)
    assert torch.equal(whole.scale, parted.scale)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_activations_are_rounded_by_at_most_half_a_step_and_zero_stays(values: list[float]) -> None:
    x = torch.tensor([[*values, 0.0]])
    found = as_8_bits(x)
    step = (x.amax().clamp(min=0) - x.amin().clamp(max=0)) / 255
    assert found[0, -1] == 0
    assert (found - x).abs().max() <= step * 1.01  # at an end of the range, zero's own rounding adds its half


def test_an_embeddings_rows_have_a_scale_each() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [100.0, 1.0, -3.0]])
    layer = QuantizedEmbedding(weight)
    found = layer(torch.tensor([[2, 0, 1]]))
    torch.testing.assert_close(found[0], weight[[2, 0, 1]], atol=100 / 254, rtol=0)
    torch.testing.assert_close(found[0, 1], weight[0], atol=2 / 254, rtol=0)
    exported = torch.export.export(layer, (torch.tensor([[2, 0, 1]]),))
    assert "embedding_byte" in str(exported.graph)
    torch.testing.assert_close(exported.module()(torch.tensor([[2, 0, 1]])), found)
