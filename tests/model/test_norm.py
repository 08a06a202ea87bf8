from dataclasses import replace

import pytest
import torch

from model.norm import Norm, QKNorm
from tests.conftest import TOY


def test_rms_norm_is_torchs() -> None:
    x = torch.randn(2, 3, 16)
    norm = Norm(replace(TOY, dim=16))
    torch.nn.init.uniform_(norm.weight)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, TOY.norm_eps))


@pytest.mark.parametrize(("over", "shape"), [("head", (8,)), ("own_head", (4, 8)), ("projection", (32,))])
def test_queries_are_normalised_by_head_or_together(over: str, shape: tuple[int, ...]) -> None:
    norm = QKNorm(replace(TOY, head_dim=8, qk_norm=True, qk_norm_over=over, norm_bias=True), n_heads=4)
    assert norm.weight.shape == shape
    assert norm.bias is None
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(2, 3, 32)
    heads = x if over == "projection" else x.view(2, 3, 4, 8)
    expected = torch.nn.functional.rms_norm(heads, heads.shape[3:] or (32,), None, TOY.norm_eps) * norm.weight
    torch.testing.assert_close(norm(x), expected.view(2, 3, 32))
