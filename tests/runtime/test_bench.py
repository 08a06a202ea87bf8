import json
from pathlib import Path

import pytest

from export.planning.memory import matrix_bytes
from export.weights.scheme import SCHEMES
from model.errors import InputError
from runtime.bench import main, measure
from runtime.engine.executorch import read_bandwidth
from runtime.engine.program import Program
from runtime.engine.session import Session
from tests.conftest import TOY


def test_lengths_that_fit_the_context_are_measured(toy_pte: Path) -> None:
    found = measure(toy_pte, prefill=(5, TOY.context, TOY.context + 1), decode=(3, TOY.context - 1, TOY.context))
    assert [row.length for row in found.prefill] == [5, TOY.context]
    assert [row.position for row in found.decode] == [3, TOY.context - 1]
    assert min(found.load, found.first_token, *(row.tokens_per_second for row in found.prefill)) > 0
    assert found.peak_bytes > 100e6
    assert found.bandwidth > 1e8


def test_the_roofline_is_the_time_to_read_weights_and_filled_caches(toy_pte: Path) -> None:
    found, session = measure(toy_pte, (), (16,)), Session(Program(toy_pte))
    (row,) = found.decode
    read = matrix_bytes(TOY, SCHEMES["fp32"]) + 2 * TOY.n_layers * TOY.n_kv_heads * TOY.head_dim * 4 * 16
    assert session.cache.filled_bytes(16) == read - matrix_bytes(TOY, SCHEMES["fp32"])
    assert row.roofline == pytest.approx(read * row.tokens_per_second / found.bandwidth)


def test_more_threads_read_no_slower() -> None:
    assert max(read_bandwidth(2) for _ in range(3)) > 0.5 * read_bandwidth(1)


def test_too_short_a_context_is_refused_with_its_length(toy_pte: Path) -> None:
    with pytest.raises(InputError, match=f"too large for the {TOY.context} positions of .*; give smaller numbers"):
        main([str(toy_pte), "--prefill", "512", "--decode", "1000"])
    with pytest.raises(SystemExit) as caught:
        main([str(toy_pte), "--prefill", "0"])
    assert caught.value.code == 2


def test_the_command_prints_text_and_json_and_plots(
    toy_pte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(toy_pte), "--prefill", "7", "--decode", "2", "9"]
    assert main([*flags, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prefill"][0].keys() == {"length", "tokens_per_second"}
    assert [row["position"] for row in found["decode"]] == [2, 9]
    assert main([*flags, "--plot", str(tmp_path / "speed.svg")]) == 0
    text = capsys.readouterr().out
    assert "decode at      9" in text
    assert "of roofline" in text
    assert (tmp_path / "speed.svg").read_text().count("<svg") == 1
