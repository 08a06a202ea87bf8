import copy
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export import verify as command
from export.llama import export_llama
from export.plan import ExportOptions
from export.recipe import Recipe
from export.scheme import SCHEMES
from export.verify import LIMITS, Verdict, compare, verify
from model.checkpoint import open_checkpoint
from model.errors import InputError
from model.model import Llama
from tests.conftest import TOY, random_model, toy_model
from tests.families import CASES, hugging_face_model


@pytest.fixture(scope="module", params=["toy", pytest.param("stories260K", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest) -> tuple[Path, Llama]:
    """A file and the model it was made from."""
    if request.param == "toy":
        return request.getfixturevalue("toy_pte"), toy_model()
    checkpoint = request.getfixturevalue("stories260k").checkpoint
    return request.getfixturevalue("stories_pte"), open_checkpoint(checkpoint).build()


def changed(model: Llama) -> Llama:
    """A copy whose weights may be written to; the checkpoint's are mapped."""
    model = copy.deepcopy(model)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    if model.config.tied:
        model.head.output.weight = model.tok_embeddings.weight
    return model.requires_grad_(False)


def verdict(file: Path, model: Llama) -> Verdict:
    return verify(file, Recipe(model.config, model.state_dict(), SCHEMES["fp32"]))


def test_a_faithful_file_passes(made: tuple[Path, Llama]) -> None:
    found = verdict(*made)
    assert found.failure is None
    assert found.quality is None, "float32 costs nothing"
    assert found.fidelity.greedy_agreement == 1
    assert found.fidelity.rows > 100


def test_any_tensor_scaled_by_a_hundredth_is_noticed(made: tuple[Path, Llama]) -> None:
    file, model = made
    names = sorted(name for name, _ in model.named_parameters())
    for name in random.Random(0).sample(names, 10):
        other = changed(model)
        other.get_parameter(name).mul_(1.01)
        found = verdict(file, other)
        assert found.failure, name
        assert found.fidelity.max_abs > 10 * found.fidelity.limits.max_abs, name


def test_two_swapped_layers_are_noticed(made: tuple[Path, Llama]) -> None:
    file, model = made
    other = changed(model)
    other.layers["0"], other.layers["1"] = other.layers["1"], other.layers["0"]
    assert verdict(file, other).failure


def test_a_model_of_other_dimensions_is_refused(toy_pte: Path) -> None:
    with pytest.raises(InputError, match="made from another model"):
        verdict(toy_pte, random_model(replace(TOY, rope_theta=5000.0)))


def test_differences_are_measured_as_defined() -> None:
    expected = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
    found = expected + torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    report = compare([found], [expected], LIMITS["float32"])
    p, q = torch.softmax(expected[1].double(), 0), torch.softmax(found[1].double(), 0)
    assert report.max_abs == 4
    assert math.isclose(report.mse, 16 / 6)
    assert math.isclose(report.kl, float((p * (p / q).log()).sum()))
    assert report.greedy_agreement == 0.5
    assert not report.passed


def test_a_nan_fails() -> None:
    logits = torch.tensor([[0.0, 1.0]])
    assert not compare([logits * math.nan], [logits], LIMITS["float32"]).passed
    assert compare([logits], [logits], LIMITS["float32"]).passed


def test_the_command_exits_with_0_or_1(toy_pte: Path, toy_bin: Path, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from tests.checkpoints import write_llama2c

    assert command.main([str(toy_pte), "--checkpoint", str(toy_bin)]) == 0
    assert "passed" in capsys.readouterr().out
    other = changed(toy_model())
    other.layers["0"].feed_forward.w2.weight.mul_(1.01)
    assert command.main([str(toy_pte), "--checkpoint", str(write_llama2c(other, tmp_path / "b.bin", 1))]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_whose_context_was_stretched_is_checked_against_the_stretched_model(tmp_path: Path) -> None:
    hugging_face_model(CASES["Llama, yarn"]).save_pretrained(tmp_path / "model")
    options = ExportOptions(checkpoint=tmp_path / "model", tokenizer=Path("none"), max_seq_len=96, prefill_chunk=1)
    pte = export_llama(replace(options, output=tmp_path / "a.pte"))
    assert command.main([str(pte), "--checkpoint", str(tmp_path / "model")]) == 0
