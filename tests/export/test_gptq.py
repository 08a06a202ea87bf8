"""Tests GPTQ, which rounds weights with the inputs of a calibration text: of one matrix, of a model, and in a file."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from export import verify as command
from export.checkpoints.checkpoint import StoredBlocks
from export.checkpoints.layouts import BUILT_IN
from export.llama import ExportOptions, export_llama
from export.lowering.trace import step
from export.planning.plan import plan
from export.quality import gptq as calibrate_module
from export.quality.eager import packed
from export.quality.gptq import CalibrationText, calibrate, gptq, importance, inverse_root
from export.quality.layer_errors import measure_layer_errors
from export.quality.perplexity import TEXT, windows
from export.weights.formats.blocks import Blocks
from export.weights.formats.float32 import FLOAT
from export.weights.formats.format import Quantised
from export.weights.formats.integer import BYTE, ROUNDINGS, Integer, codes_for
from export.weights.scheme import GPTQ, IMPORTANCE, SCHEMES, Scheme, matrices
from export.weights.source import WeightSource
from model.block_linear import BLOCK_FORMS
from model.config import ModelConfig
from model.errors import InputError
from preproc.tokenizer import open_tokenizer
from runtime.engine.program import read_metadata
from tests.bench.quantize import predicted
from tests.conftest import SMOLLM2, TOY, random_model
from tests.export.test_layer_errors import VARIANTS

FOUR = Integer(4, 32)
SCHEME = replace(SCHEMES["8da4w"], rounding=GPTQ)
FORMS: list[Quantised] = [BYTE, FOUR, Integer(4, 128), *map(Blocks.of, BLOCK_FORMS)]
FEW = replace(TOY, dim=64, hidden_dim=96, head_dim=16, vocab_size=40, tied=False)
"""A model with fewer tokens than dimensions, so that inputs are correlated."""


def correlated(seed: int, columns: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(300, 16, generator=generator) @ torch.randn(16, columns, generator=generator)
    return common + 0.5 * torch.randn(300, columns, generator=generator)


def loss(x: Tensor, weight: Tensor, found: Tensor) -> float:
    return float((x @ (weight - found).t()).square().sum())


def dense(form: Quantised, stored: Tensor) -> Tensor:
    """The numbers that a stored matrix stands for."""
    columns = 256 if isinstance(form, Blocks) else stored.shape[1]
    return form.embedding(stored, columns)(torch.arange(len(stored))[None])[0]


def text_of(path: Path) -> CalibrationText:
    found = CalibrationText.of(path, GPTQ)
    assert found
    return found


def random_tokens(config: ModelConfig, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (20, config.context), generator=generator).tolist()


def source_of(config: ModelConfig, scheme: Scheme = SCHEME) -> WeightSource:
    return WeightSource(config, random_model(config).state_dict(), scheme)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_errors_are_smaller_where_inputs_are_larger(form: Quantised) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 256)
    x = x[:, torch.randperm(256, generator=torch.Generator().manual_seed(2))]
    h = importance(x)
    values, *found = gptq(weight, None, h, form)
    torch.testing.assert_close(values, dense(form, form.restored(*found)), atol=1e-5, rtol=1e-5)
    for rounding in ROUNDINGS:
        plain = dense(form, form.stored(weight, rounding))
        assert (h * (values - weight).square()).sum() <= (h * (plain - weight).square()).sum()
    again = gptq(weight, None, h, form, with_values=False)
    assert again[0].numel() == 0
    assert all(map(torch.equal, again[1:], found))


def test_a_column_without_inputs_still_counts() -> None:
    assert torch.equal(importance(torch.zeros(3, 4)), torch.ones(4))
    found = importance(torch.tensor([[0.0, 1.0, 2.0], [0.0, -1.0, 2.0]]))
    torch.testing.assert_close(found, torch.tensor([0, 0.6, 2.4]) + 1e-4)


@settings(max_examples=10)
@given(st.integers(0, 1 << 30), st.sampled_from(FORMS))
def test_less_is_lost_than_where_each_weight_is_rounded_alone(seed: int, form: Quantised) -> None:
    weight, x = torch.randn(24, 256, generator=torch.Generator().manual_seed(seed)), correlated(seed, 256)
    values, *found = gptq(weight, inverse_root(x), importance(x), form)
    torch.testing.assert_close(values, dense(form, form.restored(*found)), atol=1e-5, rtol=1e-5)
    for rounding in ROUNDINGS:
        assert loss(x, weight, values) < 0.8 * loss(x, weight, dense(form, form.stored(weight, rounding)))


@pytest.mark.parametrize("form", [BYTE, FOUR, Integer(4, 64)])
def test_with_uncorrelated_inputs_each_weight_is_rounded_alone(form: Integer) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 192)
    for x in (torch.diag(torch.rand(192) + 0.1), torch.zeros(5, 192)):
        h = importance(x)
        _, codes, scale = gptq(weight, inverse_root(x), h, form)
        groups = zip(*(torch.split(each, form.group_size or 192, dim=-1) for each in (weight, h)), strict=True)
        assert torch.equal(scale, torch.stack([form.grid(*group).scale for group in groups], dim=1))
        assert torch.equal(codes, codes_for(weight, scale, form)[0])


def test_a_column_that_no_token_uses_is_rounded_alone() -> None:
    x = correlated(0)
    x[:, [5, 40]] = 0
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    _, codes, scale = gptq(weight, inverse_root(x), importance(x), FOUR)
    alone, _ = codes_for(weight, scale, FOUR)
    assert torch.equal(codes[:, [5, 40]], alone[:, [5, 40]])
    assert not torch.equal(codes, alone)


def test_inverse_root_is_the_root_of_the_inverse() -> None:
    x = correlated(1).double()
    hessian = x.t() @ x
    hessian += calibrate_module.DAMPING * hessian.diagonal().mean() * torch.eye(128)
    root = inverse_root(x.float().view(3, 100, 128)).double()
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root.t() @ root @ hessian, torch.eye(128).double(), atol=1e-3, rtol=0)


def test_rows_are_rounded_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(0), torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    _, codes, scale = gptq(weight, inverse_root(x), importance(x), FOUR)
    monkeypatch.setattr(calibrate_module, "_ELEMENTS_AT_ONCE", 5 * 128)
    _, parted_codes, parted_scale = gptq(weight, inverse_root(x), importance(x), FOUR)
    torch.testing.assert_close(parted_scale, scale, atol=0, rtol=1e-2)
    assert (parted_codes != codes).float().mean() < 1e-2


@pytest.mark.parametrize("quantize", ["8da4w", "q4_0", "q4_1"])
def test_a_models_stream_is_closer_to_float32s(quantize: str, tmp_path: Path) -> None:
    """Of tokens that it was not calibrated with."""
    scheme = replace(SCHEMES[quantize], rounding=GPTQ)
    calibrated = calibrate(source_of(FEW, scheme), random_tokens(FEW, 0), FEW.context, tmp_path)
    inputs = packed(FEW, random_tokens(FEW, 1)[:5], FEW.context)

    def streams(source: WeightSource) -> list[float]:
        return [found.stream for found in measure_layer_errors(source, inputs, lambda start, exact, found: None)][1:]

    ours = streams(calibrated)
    for rounding in ROUNDINGS if quantize == "8da4w" else ["nearest"]:
        theirs = streams(source_of(FEW, replace(scheme, rounding=rounding)))
        assert all(our < 0.9 * their for our, their in zip(ours, theirs, strict=True)), rounding


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_calibrated_together_equal_single_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block's results during calibration must be those of the calibrated model."""
    config, seen = VARIANTS[name], list[Tensor]()
    forward = calibrate_module._Head.forward

    def recording_forward(head: calibrate_module._Head, x: Tensor, select: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x)
        return forward(head, x, select)

    monkeypatch.setattr(calibrate_module._Head, "forward", recording_forward)
    texts = random_tokens(config, 0)[:4]
    source = calibrate(source_of(config), texts, config.context, tmp_path)
    ours = source.frame("head").norm(seen[0])
    model, exact = source.streamed(), source.unquantised().streamed()
    for text, our in zip(texts, ours, strict=True):
        inputs = packed(config, [text], config.context) | {"select": torch.eye(len(text))[None, :1]}
        with torch.no_grad():
            hidden, right = (step(each, inputs)["hidden"][0] for each in (model, exact))
        # an activation that is rounded differently changes by 1/255
        assert (our - hidden).abs().mean() < 0.02 * (hidden - right).abs().mean()
    files = {path.stem for path in tmp_path.iterdir()}
    assert files == {*(f"layers.{layer}" for layer in range(config.n_layers)), "head"}


def test_only_calibrated_matrices_are_read_from_the_folder(tmp_path: Path) -> None:
    done = list[tuple[int, int]]()
    source = calibrate(
        source_of(FEW), random_tokens(FEW, 0), FEW.context, tmp_path, lambda *progress: done.append(progress)
    )
    count = sum(map(source.is_calibrated, source.matrices))
    assert (done, done[-1]) == (sorted(done), (count, count))
    for name in matrices(FEW):
        piece = name.rpartition(".")[0] if name.startswith("head") else ".".join(name.split(".")[:2])
        with safe_open(tmp_path / f"{piece.removesuffix('.output')}.safetensors", "pt") as tensors:
            assert torch.equal(source.stored(name).qdata, tensors.get_tensor(f"{name}.0"))
        assert not torch.equal(source.stored(name).qdata, FOUR.stored(source.weight(name), "hqq").qdata)
    embedding = source.stored("tok_embeddings.weight")
    assert torch.equal(embedding.qdata, BYTE.stored(source.weight("tok_embeddings.weight"), "hqq").qdata)
    assert torch.equal(source.unquantised().stored("head.output.weight"), source.weight("head.output.weight"))
    with pytest.raises(KeyError):
        source_of(FEW).stored("head.output.weight")


@pytest.mark.parametrize(
    ("config", "scheme", "left"),
    [
        (FEW, replace(SCHEME, head=FLOAT), "head"),
        (replace(FEW, tied=True), replace(SCHEME, head=BYTE), "head"),
        (FEW, replace(SCHEME, linear=FLOAT), "layers."),
    ],
)
def test_float32_and_a_tied_head_are_not_calibrated(
    config: ModelConfig, scheme: Scheme, left: str, tmp_path: Path
) -> None:
    source = calibrate(source_of(config, scheme), random_tokens(config, 0), config.context, tmp_path)
    for name in matrices(config):
        assert source.is_calibrated(name) != name.startswith(left), name
        if name.startswith(left):
            form = scheme.format(name, 64)
            expected, found = form.stored(source.weight(name), "hqq"), source.stored(name)
            assert torch.equal(found if form == FLOAT else found.qdata, expected if form == FLOAT else expected.qdata)


def test_blocks_of_a_checkpoint_are_kept(tmp_path: Path) -> None:
    weights, name = random_model(FEW).state_dict(), "layers.0.attention.wq.weight"
    scheme = replace(SCHEMES["q4_0"], rounding=GPTQ)
    kept = scheme.linear.stored(torch.eye(64), "nearest")
    blocks = {name: StoredBlocks("Q4_0", lambda: kept)}
    source = calibrate(WeightSource(FEW, weights, scheme, blocks=blocks), random_tokens(FEW, 0), 8, tmp_path)
    assert not source.is_calibrated(name)
    assert torch.equal(source.stored(name), kept)
    assert source.is_calibrated("layers.0.attention.wk.weight")


@pytest.fixture(scope="module")
def calibrated_toy(toy_options: ExportOptions, tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    """Exports a calibrated random model and returns its options."""
    options = replace(toy_options, prefill_chunk=1, quantize="8da4w", calibrate=TEXT, max_ppl_increase=1e3)
    options = replace(options, output=tmp_path_factory.mktemp("calibrated") / "toy.pte")
    export_llama(options)
    return options


def test_a_calibrated_file_records_its_text_and_is_verified(
    calibrated_toy: ExportOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    output = calibrated_toy.output
    assert output
    provenance = read_metadata(output).provenance
    assert provenance["options"]["scheme"]["rounding"] == "gptq"
    assert provenance["calibration"] == {"sha256": text_of(TEXT).sha256}
    arguments = [str(output), "--checkpoint", str(calibrated_toy.checkpoint), "--max-ppl-increase", "1000"]
    assert command.main([*arguments, "--calibrate", str(TEXT)]) == 0
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize("rounding", [IMPORTANCE, GPTQ])
def test_a_file_of_the_built_in_text_is_verified_without_naming_it(
    rounding: str, toy_options: ExportOptions, tmp_path: Path
) -> None:
    options = replace(toy_options, prefill_chunk=1, quantize="q4_0", rounding=rounding, output=tmp_path / "toy.pte")
    path = export_llama(replace(options, max_ppl_increase=1e3))
    provenance = read_metadata(path).provenance
    text = CalibrationText.of(None, rounding)
    assert text
    assert provenance["options"]["scheme"]["rounding"] == rounding
    assert provenance["calibration"] == {"sha256": text.sha256}
    assert command.main([str(path), "--checkpoint", str(options.checkpoint), "--max-ppl-increase", "1000"]) == 0


def test_another_export_is_the_same_to_the_byte(
    calibrated_toy: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert calibrated_toy.output
    other = calibrated_toy.output.with_name("other.pte")
    export_llama(replace(calibrated_toy, output=other))
    assert other.read_bytes() == calibrated_toy.output.read_bytes()
    assert not list(tmp_path.glob("llama-pte-*")), "the matrices are gone"


def test_verifying_needs_the_same_text(calibrated_toy: ExportOptions, tmp_path: Path, toy_pte: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Once upon a time")
    arguments = [str(calibrated_toy.output), "--checkpoint", str(calibrated_toy.checkpoint)]
    with pytest.raises(InputError, match=r"toy.pte was calibrated with a text; give that text with --calibrate FILE"):
        command.main(arguments)
    with pytest.raises(InputError, match=r"other.txt is not the text that .*toy.pte was calibrated with \(SHA-256"):
        command.main([*arguments, "--calibrate", str(other)])
    with pytest.raises(InputError, match=r"made from another model"):
        command.main([str(calibrated_toy.output), "--calibrate", str(TEXT)])
    with pytest.raises(InputError, match=r"needs a calibrated file, but .*toy.pte is not one; leave it out"):
        command.main([str(toy_pte), *arguments[1:], "--calibrate", str(TEXT)])


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (None, {}, r"--calibrate .*text.txt is not a file; give a text file"),
        (b"\xff\xfe", {}, r"text.txt is not UTF-8; give a text file in UTF-8"),
        (b"", {}, r"text.txt has fewer than two tokens; give a longer text"),
        (b"Once", {"quantize": "fp32"}, r"text.txt has no effect, because no matrix .* is rounded; give another"),
        (b"Once upon", {"tokenizer": Path("none")}, r"needs a tokenizer; give --tokenizer FILE"),
        (
            b"Once upon",
            {"calibrate": None, "rounding": IMPORTANCE, "quantize": "fp32"},
            r"--rounding importance has no",
        ),
        (b"Once upon", {"rounding": "hqq"}, r"--rounding hqq has no effect with --calibrate"),
    ],
)
def test_invalid_options_are_refused_when_planned(
    text: bytes | None, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        plan(ExportOptions(**({"quantize": "8da4w", "calibrate": path} | changes)))  # type: ignore[arg-type]


def test_a_text_is_split_into_windows_of_one_length() -> None:
    tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    ids = tokenizer.encode(TEXT.read_text())
    found = text_of(TEXT).windows(tokenizer, 1, 100)
    assert {len(part) for part in found} == {100}
    assert found == [[1, *ids[start : start + 99]] for start in range(0, 100 * len(found), 100)]
    assert len(found) == min(len(ids), calibrate_module.TOKENS) // 100
    assert CalibrationText("--calibrate", "Once").windows(tokenizer, 1, 100) == [[1, *tokenizer.encode("Once")][:-1]]


TRAINING, VALIDATION = "tinystories/train-a.txt", "tinystories/valid.txt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "tokenizer", "texts"),
    [
        (BUILT_IN, None, (TRAINING, VALIDATION)),
        ("stories260K/stories260K.bin", "stories260K/tok512.model", (TRAINING, VALIDATION)),
        (SMOLLM2, None, (calibrate_module.TEXT, "wikitext2/wiki.test.raw")),
    ],
    ids=["built-in", "stories260K", "SmolLM2"],
)
def test_unseen_text_is_predicted_more_as_in_float32(
    checkpoint: str | Path, tokenizer: str | None, texts: tuple[str | Path, str], shared: Path, tmp_path: Path
) -> None:
    """The perplexity itself is compared on the large model only: on a small one, a worse rounding can predict a text
    better by accident, as where HQQ's larger scales make the built-in model's predictions more certain.
    """
    options = ExportOptions(
        checkpoint=shared / checkpoint,
        tokenizer=shared / tokenizer if tokenizer else None,
        quantize="8da4w",
        max_seq_len=512,
        calibrate=shared / texts[0],
    )
    planned = plan(options)
    assert planned.tokenizer
    ids = planned.tokenizer.encode((shared / texts[1]).read_text()[:40_000])
    parts = windows(ids, planned.provenance["bos_id"], 512, 2048)

    ours = predicted(calibrate(planned.source, planned.texts, 512, tmp_path), parts, 512)
    for rounding in ROUNDINGS:
        theirs = predicted(plan(replace(options, calibrate=None, rounding=rounding)).source, parts, 512)
        assert ours.mean_kl < 0.85 * theirs.mean_kl, rounding
        assert ours.top_1 > theirs.top_1, rounding
        if checkpoint == SMOLLM2:
            assert ours.perplexity
            assert theirs.perplexity
            assert ours.perplexity < theirs.perplexity, rounding
