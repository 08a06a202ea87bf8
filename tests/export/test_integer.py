import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from export.weights.formats.integer import BYTE, ROUNDINGS, Integer
from export.weights.formats.integer_layers import as_8_bits

GROUPS = Integer(4, 32)


def test_four_bit_layers_equal_torchaos() -> None:
    """Weights must be equal to the bit; results may differ by the rounding of activations."""
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(64, 48, bias=True)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    quantize_(
        theirs, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32), weight_scale_dtype=torch.bfloat16)
    )
    layer = GROUPS.linear(GROUPS.stored(ours[0].weight, "nearest"), ours[0].bias)
    assert torch.equal(layer.weight.qdata, theirs[0].weight.qdata)
    assert torch.equal(layer.weight.scale, theirs[0].weight.scale)
    x = torch.randn(2, 5, 64)
    step = (x.amax(-1) - x.amin(-1)).max() / 255
    most = float(step * layer.weight.dequantize().abs().sum(-1).max())
    torch.testing.assert_close(layer(x), theirs(x), atol=most, rtol=0)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_activations_are_rounded_by_at_most_half_a_step_and_zero_stays(values: list[float]) -> None:
    x = torch.tensor([[*values, 0.0]])
    found = as_8_bits(x)
    step = (x.amax().clamp(min=0) - x.amin().clamp(max=0)) / 255
    assert found[0, -1] == 0
    assert (found - x).abs().max() <= step * 1.01  # rounding of the zero point adds half a step at the ends


@pytest.mark.parametrize(("form", "operator"), [(BYTE, "embedding_byte"), (GROUPS, "embedding_4bit")])
def test_an_embedding_is_looked_up_as_it_is_exported(form: Integer, operator: str) -> None:
    torch.manual_seed(0)
    weight, tokens = torch.randn(7, 96) * torch.rand(7, 1), torch.tensor([[2, 0, 6], [1, 1, 5]])
    quantised = form.stored(weight, "nearest")
    layer = form.embedding(quantised, 96)
    torch.testing.assert_close(layer(tokens), quantised.dequantize()[tokens])
    exported = torch.export.export(layer, (tokens,))
    assert operator in str(exported.graph)
    torch.testing.assert_close(exported.module()(tokens), layer(tokens))


@pytest.mark.parametrize("form", [BYTE, GROUPS, Integer(4, 128)])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_weights_are_off_by_about_half_a_step(form: Integer, rounding: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 256)
    found = form.stored(weight, rounding)
    step = found.scale.float().repeat_interleave(form.group_size or 256, dim=1)
    off = (found.dequantize() - weight).abs() / step
    inside = weight.abs() < 7 * step if form.bits == 4 else weight.abs() < 127 * step
    assert off[inside].max() <= 0.52, "scales are bfloat16, and so are their inverses"
    assert inside.float().mean() > 0.8


def test_hqq_is_closer_than_the_nearest() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    squares = [(GROUPS.stored(weight, name).dequantize() - weight).square().mean() for name in ("hqq", "nearest")]
    assert squares[0] < squares[1]


def test_four_bit_codes_are_packed_two_to_a_byte() -> None:
    weight = GROUPS.stored(torch.randn(5, 64), "nearest")
    (_, packed), (prefix, scale) = GROUPS.parts(weight)
    pairs = torch.stack(((packed & 15).int() - 8, (packed >> 4).int() - 8), dim=-1)
    assert torch.equal(pairs.view(5, 64), weight.qdata.int())
    assert (prefix, scale.dtype, tuple(scale.shape)) == ("scale_", torch.bfloat16, (5, 2))
