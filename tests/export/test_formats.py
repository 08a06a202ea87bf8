"""Tests that every storage format fulfils its interface; a new format's instances must be added to EXAMPLES."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from export.weights.formats.blocks import Blocks
from export.weights.formats.float32 import FLOAT
from export.weights.formats.format import Format
from export.weights.formats.integer import BYTE, Integer
from export.weights.formats.registry import FORMATS, parse

BLOCKS = {"Q8_0": 0.02, "Q4_0": 0.15, "Q4_1": 0.15, "Q5_0": 0.08, "Q5_1": 0.08, "Q4_K": 0.15, "Q5_K": 0.08}
BLOCKS |= {"Q6_K": 0.04, "IQ4_NL": 0.15, "MXFP4": 0.2}
EXAMPLES: dict[Format, float] = {FLOAT: 1e-6, BYTE: 0.02, Integer(4, 32): 0.2, Integer(4, 128): 0.25}
EXAMPLES |= {Blocks.of(name): error for name, error in BLOCKS.items()}
"""Formats -> the largest error of a linear layer relative to its largest result."""

pytestmark = pytest.mark.parametrize("form", EXAMPLES, ids=str)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 512, generator=torch.Generator().manual_seed(0))


def test_every_format_is_tested(form: Format) -> None:
    assert {example.kind for example in EXAMPLES} == set(FORMATS)
    assert FORMATS[form.kind] is type(form)


def test_a_format_survives_json(form: Format) -> None:
    assert parse(json.loads(json.dumps(form.to_json()))) == form


def test_sizes_are_those_of_the_stored_data(form: Format, weight: Tensor) -> None:
    for stored in (form.stored(weight, "nearest"), form.random(weight.shape)):
        assert sum(part.nbytes for _, part in form.parts(stored)) == form.nbytes(*weight.shape)


def test_layers_compute_with_the_dequantised_weights(form: Format, weight: Tensor) -> None:
    x, bias = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(1)), torch.arange(24.0)
    stored = form.stored(weight, "nearest")
    exact = F.linear(x, weight, bias)
    found = form.linear(stored, bias)(x)
    assert (found - exact).square().mean().sqrt() < EXAMPLES[form] * F.linear(x, weight).std()
    tokens = torch.tensor([[3, 0, 23]])
    rows = form.embedding(stored, 512)(tokens)
    assert (rows - weight[tokens]).square().mean().sqrt() <= EXAMPLES[form]


@pytest.mark.parametrize("axis", [0, 1])
def test_joined_parts_equal_the_whole(form: Format, axis: int, weight: Tensor) -> None:
    stored = form.stored(weight, "nearest")
    shares = [form.share(stored, axis, lambda each, padding=0.0, i=i: each.chunk(2, axis)[i]) for i in range(2)]
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    inputs = x.chunk(2, -1) if axis == 1 else (x, x)
    found = [form.linear(share, None)(each) for share, each in zip(shares, inputs, strict=True)]
    joined = torch.cat(found, -1) if axis == 0 else found[0] + found[1]
    exact = form.linear(stored, None, width=256 if axis == 1 else None)(x)
    torch.testing.assert_close(joined, exact, atol=1e-4, rtol=1e-4)
