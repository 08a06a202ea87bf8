import copy
import math
import mmap
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export import verify as command
from export.checkpoints.layouts import open_checkpoint
from export.llama import export_llama
from export.lowering.assemble import weight_digest
from export.lowering.trace import GraphOptions
from export.planning.plan import ExportOptions, plan
from export.planning.sharding import Sharding
from export.quality.fidelity import LIMITS, Observed, compare, judge, observed
from export.quality.verification import Verdict, verify
from export.quality.weight_bytes import EPSILON, altered, weight_places
from export.weights.scheme import SCHEMES
from export.weights.source import WeightSource
from model.errors import InputError
from model.model import Llama
from runtime.engine.program import Program, read_metadata
from runtime.pte.metadata import export_identity
from tests.bench.gate import MOE, PLANTED, RUN, Right, random_file, wrong_epsilon
from tests.conftest import DEEP, TOY, planned, random_model, toy_model, write_pte
from tests.support.families import CASES, hugging_face_model


@pytest.fixture(scope="module", params=["toy", pytest.param("stories260K", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest) -> tuple[Path, Llama]:
    """Returns a file and the model it was made from."""
    if request.param == "toy":
        return request.getfixturevalue("toy_pte"), toy_model()
    checkpoint = request.getfixturevalue("stories260k").checkpoint
    return request.getfixturevalue("stories_pte"), open_checkpoint(checkpoint).build()


def changed(model: Llama) -> Llama:
    """Returns a writable copy, as a checkpoint's weights are memory-mapped."""
    model = copy.deepcopy(model)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    if model.config.tied:
        model.head.output.weight = model.tok_embeddings.weight
    return model.requires_grad_(False)


def verdict(file: Path, model: Llama) -> Verdict:
    return verify(file, WeightSource(model.config, model.state_dict(), SCHEMES["fp32"]))


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
        assert found.fidelity.error > 10 * found.fidelity.limits.error, name


def test_two_swapped_layers_are_noticed(made: tuple[Path, Llama]) -> None:
    file, model = made
    other = changed(model)
    other.layers["0"], other.layers["1"] = other.layers["1"], other.layers["0"]
    assert verdict(file, other).failure


@pytest.fixture(scope="module", params=[0, 1])
def massive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Llama]:
    """Returns a file and its model, a few of whose activations are very large, as in trained models."""
    model = random_model(DEEP, seed=request.param)
    for layer in ("1", "3"):
        model.layers[layer].feed_forward.w2.weight[5].mul_(300)
    path = tmp_path_factory.mktemp("massive") / "massive.pte"
    return write_pte(planned(model, GraphOptions(48, 7)), path), model


def swapped_rows(model: Llama) -> None:
    weight = model.layers["2"].attention.wv.weight
    weight[[0, 1]] = weight[[1, 0]]


def doubled_row(model: Llama) -> None:
    model.layers["0"].feed_forward.w1.weight[7].mul_(2)


def left_out_block(model: Llama) -> None:
    model.layers["4"].attention.wo.weight.zero_()
    model.layers["4"].feed_forward.w2.weight.zero_()


def lost_norm(model: Llama) -> None:
    model.head.norm.weight.fill_(1)


FAULTS = (swapped_rows, doubled_row, left_out_block, lost_norm)


def test_massive_activations_pass_and_hide_no_fault(massive: tuple[Path, Llama]) -> None:
    file, model = massive
    assert verdict(file, model).failure is None
    for fault in FAULTS:
        other = changed(model)
        fault(other)
        found = verdict(file, other)
        assert found.failure, fault.__name__
        assert found.fidelity.kl > 10 * found.fidelity.limits.kl, fault.__name__


@pytest.fixture(scope="module", params=["fp32", "8da8w", "experts"])
def right(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Right, Observed]:
    """Returns a correct file of a random model, and its measurements."""
    is_moe = request.param == "experts"
    model = random_model(MOE if is_moe else DEEP)
    scheme = SCHEMES["fp32" if is_moe else request.param]
    made = random_file(request.param, model, scheme, tmp_path_factory.mktemp("right"))
    return made, observed(Program(made.path))


def test_a_correct_file_passes_and_contains_the_weights(right: tuple[Right, Observed]) -> None:
    file, found = right
    fidelity = judge(file.source, found)
    assert fidelity.passed
    assert fidelity.cached is not None, "its keys and values were compared"
    assert list(altered(file.path, file.source)) == []


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_of_the_model_is_refused(
    fault: Callable[[WeightSource], WeightSource], right: tuple[Right, Observed]
) -> None:
    file, found = right
    assert not judge(fault(file.source), found).passed


def test_another_epsilon_is_named(right: tuple[Right, Observed]) -> None:
    file, _ = right
    assert list(altered(file.path, wrong_epsilon(file.source))) == [EPSILON]


@pytest.mark.parametrize("fault", RUN)
def test_a_fault_of_the_runtime_is_refused(fault: Callable[[], AbstractContextManager[None]],
                                           right: tuple[Right, Observed]) -> None:  # fmt: skip
    file, _ = right
    with fault():
        found = observed(Program(file.path))
    assert not judge(file.source, found).passed


@pytest.mark.parametrize("kind", ["linear", "head"])
@pytest.mark.parametrize("embedding_bits", [8, 4])
def test_one_bit_of_a_weight_is_named(kind: str, embedding_bits: int, tmp_path: Path) -> None:
    scheme = SCHEMES["8da8w"]
    if embedding_bits == 4:
        scheme = replace(SCHEMES["8da4w"], embedding=SCHEMES["8da4w"].head)
    made = random_file("", random_model(DEEP), scheme, tmp_path)
    assert list(altered(made.path, made.source)) == []
    name = "head.output.weight" if kind == "head" else "layers.3.feed_forward.w1.weight"
    with made.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as program:
        start, _ = weight_places(program)[weight_digest(export_identity(read_metadata(made.path).provenance), name, 0)]
        program[start + 5] ^= 1
    assert list(altered(made.path, made.source)) == [name]


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_shards_and_slices_hold_the_weights(count: int, toy_options: ExportOptions, tmp_path: Path) -> None:
    sharding = Sharding(slices=2) if count == 2 else Sharding(shards=2)
    options = replace(toy_options, quantize="8da8w", sharding=sharding, output=tmp_path / "cut", max_ppl_increase=100.0)
    found = plan(options)
    assert list(altered(export_llama(options), found.source)) == []
    model = changed(open_checkpoint(options.checkpoint).build())
    model.layers["1"].attention.wo.weight[3, 3] = 5.0
    other = WeightSource(model.config, model.state_dict(), found.source.scheme, slices=sharding.slices)
    assert set(altered(tmp_path / "cut", other)) == {"layers.1.attention.wo.weight"}


def test_limits_include_the_rounding_of_the_reference() -> None:
    expected = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    noise = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    limits = LIMITS["float32"]
    near, far = expected + 1e-2 * noise, expected + 1e-1 * noise
    assert not compare([near], [expected], limits).passed
    widened = limits.widened(compare([expected + 1e-2 * noise.flip(0)], [expected], limits))
    assert compare([near], [expected], widened).passed
    assert not compare([far], [expected], widened).passed
    assert limits.widened(compare([expected], [expected], limits)) == limits


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
    assert math.isclose(report.error, 4 / float(expected[1].std()), rel_tol=1e-6)
    assert math.isclose(report.median_kl, report.kl / 2)
    assert math.isclose(report.kl, float((p * (p / q).log()).sum()))
    assert report.greedy_agreement == 0.5
    assert not report.passed


def test_a_nan_fails() -> None:
    logits = torch.tensor([[0.0, 1.0]])
    assert not compare([logits * math.nan], [logits], LIMITS["float32"]).passed
    assert compare([logits], [logits], LIMITS["float32"]).passed


def test_the_command_exits_with_0_or_1(toy_pte: Path, toy_bin: Path, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from tests.support.checkpoints import write_llama2c

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
