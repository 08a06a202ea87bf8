import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from export import llama
from export import verify as command
from export.checkpoints.layouts import BUILT_IN, open_checkpoint
from export.lowering.trace import GraphOptions
from export.planning import plan
from export.planning.scheme_search import measure_scheme
from export.quality.layer_errors import Loss
from export.quality.perplexity import TEXT, Comparison, Gate, Quality, Rows, Span, measure, most_tokens, windows
from export.quality.verification import verify
from export.weights.scheme import SCHEMES, Scheme
from export.weights.source import WeightSource
from model.errors import InputError
from preproc.tokenizer import open_tokenizer
from tests.conftest import TOY, planned, random_model, write_pte
from tests.export.test_layer_errors import both, toy_source


class Planted(WeightSource):
    """A source whose quantised model has the matrices of one layer rounded to 2 bits."""

    layer = "layers.3."

    def weight(self, name: str) -> Tensor:
        value = super().weight(name)
        return two_bits(value.float()) if name.startswith(self.layer) and value.dim() == 2 else value


def two_bits(weight: Tensor) -> Tensor:
    groups = weight.view(weight.shape[0], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 2
    return ((groups / scale).round().clamp(-2, 1) * scale).view_as(weight)


def test_predictions_are_compared_as_defined() -> None:
    expected = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
    found = expected + torch.tensor([[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    comparison = Rows.of(expected, found, torch.tensor([2, 0])).comparison(is_text=True)

    def p(logits: Tensor, token: int) -> float:
        return math.exp(logits[token]) / sum(math.exp(logit) for logit in logits)

    def perplexity(logits: Tensor) -> float:
        return math.exp(-(math.log(p(logits[0], 2)) + math.log(p(logits[1], 0))) / 2)

    kl = sum(p(expected[1], i) * math.log(p(expected[1], i) / p(found[1], i)) for i in range(3))
    assert comparison.expected_perplexity == pytest.approx(perplexity(expected))
    assert comparison.perplexity == pytest.approx(perplexity(found))
    assert comparison.increase == pytest.approx(perplexity(found) / perplexity(expected) - 1)
    assert (comparison.mean_kl, comparison.max_kl) == (pytest.approx(kl / 2), pytest.approx(kl))
    assert (comparison.tokens, comparison.top_1) == (2, 0.5)


def test_a_text_is_split_into_windows() -> None:
    ids = list(range(10, 20))
    assert windows(ids, None, 4) == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    assert windows(ids, 1, 4) == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19]]
    assert windows(ids, 1, 4, most=6) == [[1, 10, 11, 12, 13], [1, 14, 15]]
    assert windows(ids, 1, 100) == [[1, *ids]]
    assert windows(ids, None, 1, most=2) == [[10, 11], [12, 13]]
    assert windows(ids, None, 4, most=5) == [[10, 11, 12, 13, 14], [15, 16]]
    assert windows([10], None, 4) == windows([], 1, 4) == []


def test_the_error_is_averaged_by_position_over_all_windows() -> None:
    source, texts = toy_source(), [list(range(3, 44)), list(range(50, 60))]
    quality = measure(source, texts, torch.zeros(7, TOY.vocab_size), TOY.context, "text", 1)
    assert quality.windows == (40, 9)
    assert [(span.start, span.end) for span in quality.spans[:2]] == [(0, 2), (2, 4)]
    exact, found, _ = both(source, [text[:-1] for text in texts])
    rows = Rows.of(exact, found, torch.tensor([token for text in texts for token in text[1:]]))
    here = [2, 3, 42, 43]
    assert quality.spans[1].kl == pytest.approx(float(rows.kl[here].mean()), rel=1e-4)
    assert quality.spans[1].nll_increase == pytest.approx(float((rows.nll - rows.expected_nll)[here].mean()), rel=1e-3)
    assert quality.file.tokens == 7
    assert quality.quantised.tokens == 49


@pytest.fixture(scope="module")
def healthy() -> Quality:
    """Measures the built-in model at 4 bits."""
    return built_in(WeightSource)


def built_in(kind: type[WeightSource]) -> Quality:
    checkpoint, tokenizer = open_checkpoint(BUILT_IN), open_tokenizer(BUILT_IN / "tokenizer.model")
    texts = windows(tokenizer.encode(TEXT.read_text()), tokenizer.bos_id, 512, most_tokens(checkpoint.config))
    source = kind(checkpoint.config, checkpoint.weights, SCHEMES["8da4w"])
    return measure(source, texts, torch.zeros(1, checkpoint.config.vocab_size), 512, "text", 0.1)


def test_a_healthy_model_passes(healthy: Quality) -> None:
    assert healthy.failure is None
    assert healthy.quantised.tokens == 2048
    assert healthy.quantised.mean_kl < 0.6 * healthy.kl_limit


@pytest.mark.parametrize("layer", range(5))
def test_one_layer_at_two_bits_fails_and_is_named(healthy: Quality, layer: int) -> None:
    class OneOfThem(Planted):
        layer = ""

    OneOfThem.layer = f"layers.{layer}."
    quality = built_in(OneOfThem)
    assert quality.failure is not None
    assert f"the worst layers: layers.{layer} (" in quality.failure
    assert [loss.name for loss in quality.worst] == [f"layers.{layer}"]
    assert quality.losses[layer].own == pytest.approx(healthy.losses[layer].own, rel=1e-3), (
        "that before it lost nothing"
    )


@pytest.mark.parametrize(
    "changes", [{"mean_kl": math.nan}, {"perplexity": math.nan}, {"mean_kl": 0.2}, {"perplexity": 700}]
)
def test_each_limit_is_kept_and_a_nan_fails(healthy: Quality, changes: dict[str, float]) -> None:
    assert replace(healthy, quantised=replace(healthy.quantised, **changes)).failure


def test_a_layer_of_nans_is_the_worst() -> None:
    comparison = Comparison(1, 1.0, 1.0, 0.0, 0.0, 1.0)
    losses = (
        Loss("layers.0", 0.5, 0, 0),
        Loss("layers.1", math.nan, 0, 0, {"a": 1.0, "b": 2.0}),
        Loss("head", 0, 0, 0),
    )
    quality = Quality("", (1,), comparison, comparison, comparison, losses, (Span(0, 1, 0, 0),), 0.1)
    assert quality.worst[0].worst == "layers.1 (b)"


def test_the_command_fails_the_export_keeps_the_earlier_file_and_leaves_the_report(
    toy_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "toy.pte"
    output.write_bytes(b"earlier")
    flags = ["--checkpoint", str(toy_bin), "--tokenizer", str(BUILT_IN / "tokenizer.model"), "--quantize", "8da8w"]
    flags += ["--prefill-chunk", "1"]
    assert llama.main([*flags, "--output", str(output), "--max-ppl-increase", "0%"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: quantising costs too much: perplexity ")
    assert "the worst layers: " in error
    assert error.endswith(f"{output} was not written; {tmp_path / 'toy.report.html'} has the details")
    assert output.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.pte", "toy.report.html", "toy.report.json"]
    report = json.loads((tmp_path / "toy.report.json").read_text())
    assert not report["passed"]
    assert report["failure"] in error
    assert report["failure"].split(" (")[0] in (tmp_path / "toy.report.html").read_text()


@pytest.mark.parametrize(("kv_dtype", "most"), [("float16", 1e-4), ("int8", 0.005)])
def test_a_smaller_cache_costs_little(kv_dtype: str, most: float) -> None:
    made = plan.plan(plan.ExportOptions(max_seq_len=512))
    assert made.tokenizer
    source = made.source.with_scheme(Scheme(kv_dtype=kv_dtype))
    texts = windows(made.tokenizer.encode(Gate().read()), 1, 512, 2048)
    found, _ = measure_scheme(source, texts, 512)
    assert found.within(most)
    assert found.mean_kl > 0, "it was rounded"


def test_without_a_tokenizer_no_perplexity_is_reported(tmp_path: Path) -> None:
    """Also checks that a file without caches is compared on the first tokens only."""
    made = planned(random_model(TOY), GraphOptions(TOY.context, TOY.context, kv_cache=False), SCHEMES["8da8w"])
    pte = write_pte(made, tmp_path / "toy.pte", "xnnpack")
    verdict = verify(pte, made.source)
    assert verdict.failure is None
    quality = verdict.quality
    assert quality is not None
    assert (quality.text, quality.quantised.perplexity, quality.quantised.increase) == ("random tokens", None, None)
    assert (quality.quantised.tokens, quality.file.tokens) == (512, 64)
    assert "random tokens and no perplexity" in str(verdict)
    assert quality.failure is None, "only the file is held to a limit"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-text", "absent.txt"], "--eval-text absent.txt is not a file"),
        (["--eval-text", "bytes.txt"], "--eval-text bytes.txt is not UTF-8"),
        (["--eval-text", "empty.txt"], "--eval-text empty.txt has fewer than two tokens"),
        (["--max-ppl-increase=-1%"], "--max-ppl-increase -0.01 is invalid"),
        (["--max-ppl-increase", "nan"], "--max-ppl-increase nan is invalid"),
        (["--max-ppl-increase", "2%", "--quantize", "fp32"], "--max-ppl-increase needs a quantised file"),
        (["--eval-text", "good.txt", "--tokenizer", "none"], "--eval-text needs a tokenizer"),
    ],
)
def test_invalid_texts_and_limits_are_refused_before_the_export(
    toy_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "good.txt").write_text("A long enough text.")
    tokenizer = ["--tokenizer", str(BUILT_IN / "tokenizer.model"), "--quantize", "8da8w"]
    with pytest.raises(InputError, match=message):
        llama.main(["--checkpoint", str(toy_bin), *tokenizer, *flags])
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("share", ["much", "%", "2%%"])
def test_a_malformed_share_is_refused(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        llama.main(["--quantize", "8da8w", "--max-ppl-increase", share])
    assert caught.value.code == 2
    assert f"{share} is invalid; give a share such as 2% or 0.02" in capsys.readouterr().err


def test_a_float32_file_has_no_report(toy_pte: Path) -> None:
    with pytest.raises(InputError, match="--report needs a quantised file"):
        command.main([str(toy_pte), "--report"])


def test_the_gate_is_not_part_of_the_provenance(toy_options: plan.ExportOptions, tmp_path: Path) -> None:
    options = replace(toy_options, quantize="8da8w")
    other = replace(options, eval_text=tmp_path / "a.txt", max_ppl_increase=0.3)
    assert plan.plan(options).provenance == plan.plan(other).provenance
    assert Gate.of(None, 0.3).max_ppl_increase == 0.3


@pytest.mark.slow
def test_a_layer_at_two_bits_fails_the_built_in_models_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quantize", "8da4w", "--max-seq-len", "512", "--output", str(tmp_path / "tiny.pte")]
    monkeypatch.setattr(plan, "WeightSource", Planted)
    assert llama.main(flags) == 1
    assert "the worst layers: layers.3 (" in capsys.readouterr().err
    assert not (tmp_path / "tiny.pte").exists()
    report = json.loads((tmp_path / "tiny.report.json").read_text())
    assert report["fidelity"]["kl"] < report["fidelity"]["limits"]["kl"], "the file has what it was told to have"
    monkeypatch.undo()
    assert llama.main(flags) == 0
    assert json.loads((tmp_path / "tiny.report.json").read_text())["passed"]
