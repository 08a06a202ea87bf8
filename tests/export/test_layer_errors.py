from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from export.quality.eager import packed, reference
from export.quality.layer_errors import Loss, measure_layer_errors
from export.weights.scheme import SCHEMES
from export.weights.source import WeightSource
from model.config import ModelConfig
from tests.conftest import TOY, random_model

TEXTS = [[5, 6, 7, 8, 9, 10, 11], [8, 3], [9, 10, 11, 12, 13]]
VARIANTS = {
    "tied": TOY,
    "untied, head bias": replace(TOY, tied=False, head_bias=True, vocab_size=100),
    "learned positions": replace(TOY, positions="learned"),
    "alibi": replace(TOY, positions="alibi"),
    "windows": replace(TOY, sliding_window=3, local_layers=(1,)),
    "scaled and capped": replace(TOY, embedding_scale=3.0, logit_scale=0.5, logit_softcap=2.0, attention_softcap=5.0),
    "experts": replace(TOY, n_experts=3, n_chosen_experts=2),
    "parallel": replace(TOY, parallel=True, norm="layer", norm_bias=True, gated=False),
}


def toy_source(config: ModelConfig = TOY, scheme: str = "8da4w") -> WeightSource:
    model = random_model(config)
    return WeightSource(config, model.state_dict(), SCHEMES[scheme])


def both(source: WeightSource, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, tuple[Loss, ...]]:
    """Returns the logits in float32 and quantised, each joined from its parts, and the losses."""
    exact, found = list[Tensor](), list[Tensor]()

    def take(start: int, one: Tensor, other: Tensor) -> None:
        assert start == sum(map(len, exact))
        exact.append(one)
        found.append(other)

    losses = measure_layer_errors(source, packed(source.config, texts, TOY.context), take)
    return torch.cat(exact), torch.cat(found), losses


@pytest.mark.parametrize("name", VARIANTS)
def test_models_in_lockstep_equal_models_run_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy_source(VARIANTS[name])
    monkeypatch.setattr("export.quality.layer_errors._LOGITS_AT_ONCE", 3 * source.config.vocab_size)
    exact, found, _ = both(source, TEXTS)
    alone, quantised = source.unquantised().streamed(), source.streamed()
    torch.testing.assert_close(exact, torch.cat(reference(alone, TEXTS, None, TOY.context)), atol=2e-5, rtol=1e-5)
    # an activation that is rounded differently changes by 1/255
    expected = torch.cat(reference(quantised, TEXTS, None, TOY.context))
    assert (found - expected).abs().mean() < 0.02 * (exact - expected).abs().mean()


def test_losses_are_as_defined() -> None:
    """Computes the losses of the embedding and of the first block from their pieces."""
    source = toy_source()
    inputs = packed(TOY, TEXTS[:1], TOY.context)
    _, _, losses = both(source, TEXTS[:1])
    assert [loss.name for loss in losses] == ["tok_embeddings", "layers.0", "layers.1", "head"]

    def relative(error: Tensor, right: Tensor) -> float:
        ratios = [float(e.dot(e) / r.dot(r)) for e, r in zip(error[0], right[0], strict=True)]
        return sum(ratios) / len(ratios)

    exact = source.unquantised()
    x, rounded = exact.piece("tok_embeddings")(inputs["tokens"]), source.piece("tok_embeddings")(inputs["tokens"])
    assert losses[0].own == losses[0].stream == pytest.approx(relative(rounded - x, x), rel=1e-4)
    block, other = exact.piece("layers.0"), source.piece("layers.0")
    where = ((inputs["cos"], inputs["sin"]), inputs["mask"])
    y, own, stream = block(x, *where)[0], other(x, *where)[0], other(rounded, *where)[0]
    assert losses[1].own == pytest.approx(relative(own - y, y - x), rel=1e-3)
    assert losses[1].stream == pytest.approx(relative(stream - y, y), rel=1e-3)
    assert losses[1].mse == pytest.approx(float((stream - y).square().mean()), rel=1e-3)
    normed = block.attention_norm(x)
    right = block.attention.wq(normed)
    assert losses[1].linears["attention.wq"] == pytest.approx(
        relative(other.attention.wq(normed) - right, right), rel=1e-3
    )
    assert set(losses[1].linears) == {f"attention.w{role}" for role in "qkvo"} | {
        f"feed_forward.w{i}" for i in (1, 2, 3)
    }


def test_a_float32_model_has_no_loss() -> None:
    _, _, losses = both(toy_source(scheme="fp32"), TEXTS)
    assert all(loss.own == loss.mse == 0 and not any(loss.linears.values()) for loss in losses[:-1])
    assert losses[-1].own < 1e-12, "the head is multiplied in parts"
