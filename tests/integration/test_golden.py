"""Tests Python against the golden files that the C++ runner is tested against, too (tests/cpp/test_golden.cpp)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from export.checkpoints.layouts import BUILT_IN, open_checkpoint
from export.planning.plan import ExportOptions
from preproc.tokenizer import open_tokenizer
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions, StopFilter, generate
from runtime.text.prompts import prompt_ids
from runtime.text.sampler import Rng, SamplingOptions, logprobs, sample
from tests.golden.generate import constants
from tests.support.kinds import recomputed
from tests.support.prescribed import steps_of

GOLDEN = Path(__file__).parents[1] / "golden"


def _golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def _sampling(case: dict[str, Any]) -> SamplingOptions:
    given = {name: case[name] for name in vars(SamplingOptions()) if name in case}
    bias = {int(token): value for token, value in case.get("logit_bias", {}).items()}
    return SamplingOptions(**(given | {"logit_bias": bias}))


def test_constants() -> None:
    assert constants() == _golden("constants.json")


def test_coins() -> None:
    for entry in _golden("sampler.json")["coins"]:
        rng = Rng(entry["seed"])
        assert [rng.coin() for _ in entry["values"]] == entry["values"]


def test_sampler() -> None:
    golden = _golden("sampler.json")
    for case in golden["cases"]:
        rng = Rng(case["seed"])
        logits = torch.tensor(golden["logits"][case["logits"]])
        recent = list(case.get("recent", ()))
        for token in case["tokens"]:
            assert sample(logits, _sampling(case), rng, recent) == token, case
            recent.append(token)


def test_logprobs() -> None:
    golden = _golden("sampler.json")
    for row in golden["logprobs"]:
        logprob, top = logprobs(torch.tensor(golden["logits"][row["logits"]]), row["token"], row["k"])
        assert logprob == pytest.approx(row["logprob"], rel=1e-12, abs=1e-12)
        assert [token for token, _ in top] == [token for token, _ in row["top_logprobs"]]
        expected = [value for _, value in row["top_logprobs"]]
        assert [value for _, value in top] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_finish() -> None:
    tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    for case in _golden("finish.json")["cases"]:
        assert steps_of(case, tokenizer) == [tuple(step) for step in case["steps"]], case["name"]


def _one_each(text: str) -> str:
    """Merges adjacent U+FFFD, of which SentencePiece writes one per invalid byte, and Python's codec one per invalid
    sequence.
    """
    return re.sub("\N{REPLACEMENT CHARACTER}+", "\N{REPLACEMENT CHARACTER}", text)


def test_finish_equals_sentencepieces_text_up_to_the_first_stop_string() -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(BUILT_IN / "tokenizer.model"))
    reasons = set()
    for case in _golden("finish.json")["cases"]:
        tokens = [token for token, _, _ in case["steps"]]
        before, whole = (_one_each(theirs.decode(ids)) for ids in (case["prompt"], case["prompt"] + tokens))
        text = whole.removeprefix(before.rstrip("\N{REPLACEMENT CHARACTER}"))
        first = min((text.find(stop) for stop in case["stop_strings"] if stop in text), default=len(text))
        assert _one_each("".join(said for _, said, _ in case["steps"])) == text[:first], case["name"]
        stopped = first < len(text) or tokens[-1] in case["stop_ids"]
        assert [reason for _, _, reason in case["steps"]][:-1] == [None] * (len(tokens) - 1)
        assert case["steps"][-1][2] == ("stop" if stopped else "length"), case["name"]
        full = len(case["prompt"]) + len(tokens) - 1 == case["capacity"]
        reasons.add((stopped, tokens[-1] in case["stop_ids"], len(tokens) == case["max_new_tokens"], full))
    assert reasons >= {
        (True, True, False, False),
        (True, False, False, False),
        (True, False, True, False),
        (False, False, True, False),
        (False, False, False, True),
    }


def test_stop_filter() -> None:
    for case in _golden("finish.json")["filters"]:
        stop_filter = StopFilter(case["stop_strings"])
        given = [*(stop_filter.add(piece) for piece in case["pieces"]), stop_filter.finish()]
        assert (given, stop_filter.stopped) == (case["given"], case["stopped"]), case


def _check_generation(golden: dict[str, Any], path: Path) -> None:
    program = Program(path)
    assert program.metadata.provenance["checkpoint"] == golden["checkpoint"], "run python -m tests.golden.generate"
    for run in golden["runs"]:
        assert prompt_ids(program, run["prompt"]) == run["prompt_ids"]
        options = GenerationOptions(_sampling(run), run["max_new_tokens"], program.metadata.stop_ids)
        steps = list(generate(Session(program), run["prompt_ids"], options, Rng(run["seed"]), program.tokenizer))
        assert [step.token for step in steps] == run["ids"]
        assert "".join(step.text for step in steps) == run["text"]


def test_stories260k(stories_pte: Path) -> None:
    _check_generation(_golden("stories260K.json"), stories_pte)


def test_tiny(tiny_pte: Path) -> None:
    _check_generation(_golden("tiny.json"), tiny_pte)


def _check_eager(golden: dict[str, Any], checkpoint: Path) -> None:
    """Checks that each greedy id has the highest logit, computed in one pass of the eager model."""
    model = open_checkpoint(checkpoint).build()
    for run in golden["runs"]:
        if run["temperature"] == 0:
            logits, _ = recomputed(model, run["prompt_ids"] + run["ids"])
            start = len(run["prompt_ids"]) - 1
            assert logits[start:-1].argmax(-1).tolist() == run["ids"]


def test_eager_stories260k(stories260k: ExportOptions) -> None:
    _check_eager(_golden("stories260K.json"), stories260k.checkpoint)


def test_eager_tiny() -> None:
    _check_eager(_golden("tiny.json"), BUILT_IN)


def test_greedy_is_what_llama2_c_prints(shared: Path) -> None:
    run = _golden("stories260K.json")["runs"][0]
    assert run["text"] == (shared / "stories260K" / "greedy-200.txt").read_text()
