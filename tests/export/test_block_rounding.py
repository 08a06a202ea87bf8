"""Rounding to blocks: nearest values, and scales for columns that matter more than others."""

import pytest
import torch
from torch import Tensor

from export.weights.formats.block_rounding import blocks_of, fitted
from model.block_linear import BLOCK_FORMS
from tests.support.blocks import numbers

pytestmark = pytest.mark.parametrize("kind", BLOCK_FORMS)


@pytest.fixture
def weight() -> Tensor:
    found = torch.randn(48, 512, generator=torch.Generator().manual_seed(0))
    found[3], found[5, :32] = 0, 0
    return found


@pytest.fixture
def importance() -> Tensor:
    return 10 ** (2 * torch.randn(512, generator=torch.Generator().manual_seed(1)))


def test_weighted_errors_are_smaller_with_their_weights(kind: str, weight: Tensor, importance: Tensor) -> None:
    plain, weighted = (numbers(blocks_of(weight, kind, h), kind) - weight for h in (None, importance))
    errors = [float((importance * error.square()).sum()) for error in (weighted, plain)]
    assert errors[0] <= errors[1]
    if not kind.startswith("MX"):  # has only two scales to choose from
        assert errors[0] < 0.95 * errors[1]


def test_equal_importance_is_none(kind: str, weight: Tensor) -> None:
    assert torch.equal(blocks_of(weight, kind), blocks_of(weight, kind, torch.full((512,), 4.0)))


def test_rows_are_rounded_alike_in_parts(kind: str, weight: Tensor, importance: Tensor) -> None:
    parts = [blocks_of(rows, kind, importance) for rows in torch.split(weight, 7)]
    assert (torch.cat(parts) != blocks_of(weight, kind, importance)).float().mean() < 0.01


def test_columns_are_rounded_to_the_values_that_are_stored(kind: str, weight: Tensor) -> None:
    form = BLOCK_FORMS[kind]
    columns = weight[:, : form.columns]
    scales = fitted(columns, torch.ones(form.columns), kind)
    rounded = [scales.round(column, i) for i, column in enumerate(columns.t())]
    assert torch.equal(torch.stack([codes for codes, _ in rounded], dim=1), scales.nearest(columns))
    values = torch.stack([values for _, values in rounded], dim=1)
    torch.testing.assert_close(values, numbers(blocks_of(columns, kind), kind), atol=1e-6, rtol=1e-6)


def test_no_other_code_is_nearer(kind: str, weight: Tensor) -> None:
    form = BLOCK_FORMS[kind]
    scales = fitted(weight[:, : form.columns], torch.ones(form.columns), kind)
    column = weight[:, 0]
    _, values = scales.round(column, 0)
    reachable = torch.stack([scales.round(x, 0)[1] for x in torch.linspace(-6, 6, 2001)[:, None].expand(-1, 48)])
    nearest = (reachable - column).abs().amin(0)
    torch.testing.assert_close((values - column).abs(), nearest, atol=1e-6, rtol=0)
