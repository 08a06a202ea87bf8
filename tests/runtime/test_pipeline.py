"""Tests a model in shards or slices on several ranks: equal tokens, failing ranks, and a slow network."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.llama import export_llama
from export.planning.plan import ExportOptions
from export.planning.sharding import Sharding
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.conftest import DEEP, MODELS, exported, random_options
from tests.support.ranks import ended, hosts, start
from tests.support.slices import GROUPED

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5] * 3, [2], [7, 1, 8, 2, 8], [1] * 20, [6, 6], [5, 4]]
"""The first prompt is longer than a chunk."""

NEW = 24


@pytest.fixture(scope="module")
def models(stories260k: ExportOptions, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ExportOptions]:
    """Returns the models' export options. All have five blocks, except the small one, which is for slices."""
    return {
        "stories260K": replace(stories260k, prefill_chunk=16),
        "built-in": ExportOptions(max_seq_len=128, prefill_chunk=16),
        "grouped": random_options(DEEP, tmp_path_factory.mktemp("grouped")),
        "small": random_options(GROUPED, tmp_path_factory.mktemp("small")),
    }


def folder(models: Mapping[str, ExportOptions], name: str, shards: int = 5) -> Path:
    """Exports one of the models in shards."""
    output = MODELS / f"pipeline-{name}-{shards}.shards"
    return exported(replace(models[name], sharding=Sharding(shards), output=output))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a file with PROMPTS and one invalid prompt."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt_ids": ids} for ids in (*PROMPTS, [])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def expected(shards: Path, temperature: float = 0.0, count: int = NEW) -> list[list[int]]:
    """Generates the texts of PROMPTS one after another in one process."""
    program = Program(shards)
    options = GenerationOptions(SamplingOptions(temperature), count, program.metadata.stop_ids)
    return [
        [step.token for step in generate(Session(program), ids, options, Rng(5), program.tokenizer)] for ids in PROMPTS
    ]


def command(shards: Path, prompts: Path, temperature: float = 0.0, count: int = NEW) -> list[str | Path]:
    flags = ["--temperature", str(temperature), "--seed", "5", "--max-new-tokens", str(count)]
    return ["runtime.pipeline", shards, "--prompts-file", prompts, *flags]


def results(ranks: Sequence[subprocess.Popen[str]], codes: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Returns the JSON lines of the first rank and checks all exit codes. By default the first rank's is 1, because one
    prompt is invalid.
    """
    done = ended(ranks)
    expected = codes or [1] + [0] * (len(ranks) - 1)
    assert [code for code, _, _ in done] == expected, "\n".join(error for _, _, error in done)
    assert not any(out for _, out, _ in done[1:]), "only the first rank prints"
    return [json.loads(line) for line in done[0][1].splitlines()]


@pytest.mark.parametrize(
    ("name", "count", "temperature"),
    [
        ("grouped", 3, 0.8),
        *(
            pytest.param(name, count, temperature, marks=pytest.mark.slow)
            for name in ("stories260K", "grouped", "built-in")
            for count in (2, 3, 4, 5)
            for temperature in (0.0, 0.8)
        ),
    ],
)
def test_any_number_of_ranks_gives_the_tokens_of_one_process(
    name: str, count: int, temperature: float, models: Mapping[str, ExportOptions], prompts: Path
) -> None:
    shards = folder(models, name)
    *found, bad = results(start([command(shards, prompts, temperature)] * count))
    assert [result["token_ids"] for result in found] == expected(shards, temperature)
    assert bad == {"number": len(PROMPTS), "error": "the prompt is empty; give at least one token"}


def slices(models: Mapping[str, ExportOptions], name: str, count: int) -> Path:
    """Exports one of the models in slices."""
    return exported(replace(models[name], sharding=Sharding(slices=count), output=MODELS / f"{name}-{count}.slices"))


@pytest.mark.parametrize(
    ("name", "count", "ranks"),
    [
        ("small", 2, 2),
        *(
            pytest.param(name, count, ranks, marks=pytest.mark.slow)
            for name in ("stories260K", "small", "built-in")
            for count, ranks in ((2, 2), (4, 4), (4, 2))
        ),
    ],
)
def test_slices_on_ranks_give_the_whole_models_tokens(
    name: str, count: int, ranks: int, models: Mapping[str, ExportOptions], prompts: Path
) -> None:
    *found, _ = results(start([command(slices(models, name, count), prompts)] * ranks), codes=[1] * ranks)
    whole = exported(replace(models[name], output=MODELS / f"{name}-whole.pte"))
    assert [result["token_ids"] for result in found] == expected(whole)


@pytest.mark.slow
def test_after_a_rank_with_slices_is_killed_another_run_continues(
    models: Mapping[str, ExportOptions], prompts: Path, tmp_path: Path
) -> None:
    folder, journal = slices(models, "small", 2), tmp_path / "journal"
    arguments = [*command(folder, prompts, 0.8), "--journal", journal, "--timeout", "4"]
    ranks = start([arguments] * 2)
    wait_for_lines(journal, 20)
    ranks[1].kill()
    check_ended(ranks, 1)
    kept = journal.read_bytes()
    *found, _ = results(start([arguments]))
    assert [result["token_ids"] for result in found] == expected(folder, 0.8)
    assert journal.read_bytes().startswith(kept)
    assert journal.read_bytes().count(b"\n") == 1 + sum(len(result["token_ids"]) for result in found)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces")
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_hosts_on_a_slow_network_give_the_same_tokens(
    count: int, models: Mapping[str, ExportOptions], prompts: Path
) -> None:
    shards = folder(models, "stories260K")
    with hosts(count) as found:
        prefixes, environments = zip(*found, strict=True)
        *results_there, _ = results(start([command(shards, prompts)] * count, environments, prefixes))
    assert [result["token_ids"] for result in results_there] == expected(shards)


def wait_for_lines(journal: Path, lines: int) -> None:
    """Waits until a journal has `lines` lines."""
    limit = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < limit, "nothing is run"
        time.sleep(0.005)


def check_ended(ranks: Sequence[subprocess.Popen[str]], at: int) -> None:
    """Checks that every rank but one ended with an error about another rank."""
    for rank, (code, _, error) in enumerate(ended(ranks, within=30)):
        if rank != at:
            assert code == 2, error
            assert "ended or did not answer within 4 s" in error, error
            assert "Traceback" not in error


@pytest.mark.parametrize("at", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 2))])
def test_where_a_rank_is_killed_the_others_end_and_a_new_run_repeats_no_token(
    at: int, models: Mapping[str, ExportOptions], prompts: Path, tmp_path: Path
) -> None:
    shards, journal = folder(models, "stories260K"), tmp_path / "journal"
    arguments = [*command(shards, prompts, 0.8, count=300), "--journal", journal, "--timeout", "4"]
    ranks = start([arguments] * 3)
    wait_for_lines(journal, 40)
    ranks[at].kill()
    check_ended(ranks, at)
    with journal.open("ab") as file:
        file.write(b"1 2")  # a partial line, as left by a rank killed while writing
    kept = journal.read_bytes().removesuffix(b"1 2")
    *found, _ = results(start([arguments] * 2))
    assert [result["token_ids"] for result in found] == expected(shards, 0.8, count=300)
    assert journal.read_bytes().startswith(kept)
    count = sum(len(result["token_ids"]) for result in found)
    assert journal.read_bytes().count(b"\n") == 1 + count, "each token was chosen once"
    *again, _ = results(start([arguments]))
    assert again == found
    assert journal.read_bytes().count(b"\n") == 1 + count
    (code, _, error) = ended(start([[*command(shards, prompts, 0.7), "--journal", journal]]))[0]
    assert code == 2
    assert "belongs to a run with another model" in error


def test_a_rank_that_does_not_answer_ends_the_others_in_time(
    models: Mapping[str, ExportOptions], prompts: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    arguments = [*command(folder(models, "stories260K"), prompts, 0.8, count=300), "--journal", journal]
    ranks = start([[*arguments, "--timeout", "4"]] * 3)
    wait_for_lines(journal, 40)
    ranks[1].send_signal(signal.SIGSTOP)
    stopped, begun = ranks.pop(1), time.monotonic()
    check_ended(ranks, -1)
    assert time.monotonic() - begun < 20
    stopped.kill()
    stopped.communicate()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("missing", ("the shard with blocks 1 to 1 is missing beside", "1-of-5.pte")),
        pytest.param(
            "foreign", ("rank 1's", "2-of-5.pte is from another export than rank 0's"), marks=pytest.mark.slow
        ),
        pytest.param(
            "too few", ("3 ranks need as many shards, but there are 2; export with --shards 3",), marks=pytest.mark.slow
        ),
        pytest.param("damaged", ("rank 1:", "-of-5.pte is damaged: its checksum"), marks=pytest.mark.slow),
        pytest.param(
            "slices",
            ("2 slices cannot be divided among 3 ranks; start 2 ranks, or a divisor of it",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "no slice", ("rank 1 lacks slice 2 of 2; copy it there, or export again",), marks=pytest.mark.slow
        ),
        ("other options", ("rank 1 has the options", "give all ranks the same")),
        pytest.param(
            "no device", ("rank 1: LLAMA_PTE_DEVICE=cpu:9999 is invalid on this machine",), marks=pytest.mark.slow
        ),
    ],
)
def test_invalid_runs_are_refused_by_every_rank(
    wrong: str, words: tuple[str, ...], models: Mapping[str, ExportOptions], prompts: Path, tmp_path: Path
) -> None:
    here = shutil.copytree(folder(models, "grouped"), tmp_path / "here")
    there, count, devices = shutil.copytree(here, tmp_path / "there"), 2, ["cpu", "cpu", "cpu"]
    first, second = command(here, prompts), command(there, prompts)
    if wrong == "missing":
        for place in (here, there):
            (place / "2-of-5.pte").unlink()
    elif wrong == "foreign":
        other = export_llama(
            replace(models["grouped"], prefill_chunk=5, sharding=Sharding(5), output=tmp_path / "other")
        )
        shutil.copy(other / "2-of-5.pte", there)
    elif wrong == "too few":
        count, first = 3, command(folder(models, "grouped", shards=2), prompts)
        second = first
    elif wrong == "damaged":
        for shard in there.iterdir():
            with shard.open("r+b") as file:
                file.seek(-200, os.SEEK_END)
                file.write(b"damage")
    elif wrong == "slices":
        first = second = command(slices(models, "small", 2), prompts)
        count = 3
    elif wrong == "no slice":
        here = shutil.copytree(slices(models, "small", 2), tmp_path / "slices")
        (here / "2-of-2.pte").unlink()
        first = second = command(here, prompts)
    elif wrong == "other options":
        second = command(there, prompts, temperature=0.5)
    else:
        devices[1] = "cpu:9999"
    done = ended(start([first, *[second] * (count - 1)], [{"LLAMA_PTE_DEVICE": each} for each in devices]))
    for code, out, error in done:
        assert (code, out) == (2, "")
        assert all(word in error for word in words), error
