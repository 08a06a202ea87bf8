from dataclasses import replace
from pathlib import Path

import pytest

from export.llama import export_llama, main
from export.planning.plan import ExportOptions, plan
from export.planning.scheme_search import (
    NothingFitsError,
    candidates,
    choose_scheme,
    measure_scheme,
    most_sensitive,
    smallest,
    stored_bytes,
)
from export.quality.layer_errors import Loss
from export.quality.perplexity import Gate, most_tokens, windows
from export.weights.formats.integer import BYTE, Integer
from export.weights.scheme import SCHEMES, Scheme
from model.errors import InputError
from runtime.engine.program import read_metadata
from tests.conftest import MODELS, TOY
from tests.support.kinds import PLAIN

FEW = "Once upon a time there was a small fox. The fox liked to run in the wood, and one day it met a bear. " * 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "few.txt"
    path.write_text(FEW)
    return path


def test_size_counts_all_matrices_and_a_tied_embedding_once() -> None:
    config = replace(PLAIN, dim=64, hidden_dim=64, n_heads=8, n_kv_heads=8, vocab_size=100)  # all matrices are square
    square = 2 * (4 + 3) * 64 * 64 + 100 * 64  # weights of two blocks and the head
    assert stored_bytes(config, SCHEMES["fp32"]) == 4 * (square + 6400)
    assert stored_bytes(replace(config, tied=True), SCHEMES["fp32"]) == 4 * square
    four = Integer(4, 32)
    assert stored_bytes(replace(config, tied=True), Scheme(four, four, four)) == square * 9 // 16
    assert stored_bytes(replace(config, tied=True), Scheme(four, four, BYTE)) == square * 9 // 16 + 100 * 68


def test_candidates_are_ordered_by_size() -> None:
    config = replace(PLAIN, dim=256, n_heads=8, head_dim=32, n_kv_heads=8, hidden_dim=256, vocab_size=1000)
    sizes = [
        stored_bytes(config, replace(candidate.scheme, others={"layers.0": BYTE} if candidate.careful else {}))
        for candidate in candidates("hqq")
    ]
    assert sizes == sorted(sizes)
    assert {candidate.scheme.rounding for candidate in candidates("hqq")} == {"hqq"}
    assert {candidate.quantize for candidate in candidates("hqq")} == {"8da4w", "mixed", "8da8w"}


def test_the_blocks_that_lose_most_are_kept() -> None:
    losses = [Loss(f"layers.{layer}", own, 0, 0) for layer, own in enumerate((0.1, 0.5, 0.2, 0.4, 0.3))]
    losses = [Loss("tok_embeddings", 9, 0, 0), *losses, Loss("head", 9, 0, 0)]
    assert most_sensitive(losses, 0.25) == (1, 3)
    assert most_sensitive(losses, 0.01) == (1,)


def test_the_smallest_scheme_within_the_budget_is_chosen(text: Path) -> None:
    planned = plan(ExportOptions(max_seq_len=128, auto=True))
    assert planned.tokenizer
    texts = windows(planned.tokenizer.encode(FEW), 1, 128)
    tried = list[str]()
    budget = 0.03
    found = smallest(planned, texts, budget, tried.append)
    comparison, _ = measure_scheme(found.source, texts, 128)
    assert comparison.within(budget)
    config = found.source.config
    assert stored_bytes(config, found.source.scheme) <= stored_bytes(config, SCHEMES["8da8w"])
    assert len(tried) > 1, "it was not the first"
    with pytest.raises(NothingFitsError, match=r"within 0\.0001% of float32's"):
        smallest(planned, texts, 1e-6, tried.append)


@pytest.mark.slow
def test_a_mixed_file_lists_its_blocks_with_more_bits(text: Path) -> None:
    options = ExportOptions(max_seq_len=128, quantize="mixed", eval_text=text, output=MODELS / "mixed.pte")
    planned = choose_scheme(plan(options), Gate.of(text, None), False, print)
    others = planned.source.scheme.others
    assert list(others.values()) == [BYTE] * 2, "a quarter of 5 and rounded up"
    metadata = read_metadata(export_llama(options))
    assert Scheme.of(metadata).others == others
    assert metadata.provenance["options"]["quantize"] == "mixed"


def test_nothing_can_be_measured_without_a_text(toy_bin: Path) -> None:
    options = ExportOptions(checkpoint=toy_bin, tokenizer=Path("none"), quantize="mixed")
    with pytest.raises(InputError, match="--quantize mixed needs a tokenizer, because it measures on a text"):
        choose_scheme(plan(options), Gate(), False, print)


def test_auto_takes_no_scheme(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--auto chooses the scheme; leave --quantize"):
        ExportOptions(auto=True, group_size=64)


def test_a_budget_that_no_scheme_fits_exits_with_1(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--max-seq-len", "128", "--auto", "--max-ppl-increase", "0.000001", "--eval-text", str(text)]
    assert main([*arguments, "--output", str(tmp_path / "a.pte")]) == 1
    assert "no scheme up to 8 bits keeps perplexity within" in capsys.readouterr().err
    assert not (tmp_path / "a.pte").exists()


def test_small_models_are_measured_on_more_tokens() -> None:
    assert most_tokens(TOY) > most_tokens(replace(TOY, dim=4096, hidden_dim=14336))
