from dataclasses import replace

import pytest
import torch

from export.quality.eager import reference
from export.weights.scheme import SCHEMES
from export.weights.source import WeightSource, piece_names
from tests.conftest import TOY, random_model

TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.mark.parametrize("tied", [True, False])
def test_a_streamed_model_equals_the_whole_one(tied: bool) -> None:
    model = random_model(replace(TOY, tied=tied, positions="learned"))
    streamed = WeightSource(model.config, model.state_dict(), SCHEMES["fp32"]).streamed()
    for ours, theirs in zip(reference(streamed, TEXTS), reference(model, TEXTS), strict=True):
        assert torch.equal(ours, theirs)


def test_a_streamed_model_keeps_no_weights() -> None:
    model = random_model(replace(TOY, hidden_dim=64))
    streamed = WeightSource(model.config, model.state_dict(), SCHEMES["8da4w"]).streamed()
    reference(streamed, TEXTS)
    assert not list(streamed.parameters())
    assert not list(streamed.buffers())


def test_pieces_are_the_whole_model() -> None:
    config = replace(TOY, positions="learned")
    model = random_model(config)
    names = {f"{piece}.{name}" for piece in piece_names(config) for name in model.get_submodule(piece).state_dict()}
    assert names == model.state_dict().keys()
