"""Python against the golden files that the C++ runner reads too (tests/cpp/test_golden.cpp)."""

import json
from pathlib import Path
from typing import Any

import torch

from export.plan import ExportOptions
from model.checkpoint import BUILT_IN, open_checkpoint
from runtime.generate import GenerationOptions, generate, prompt_ids
from runtime.program import Program
from runtime.sampler import Rng, SamplingOptions, sample
from runtime.session import Session
from tests.kinds import recomputed

GOLDEN = Path(__file__).parent / "golden"


def _golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def _sampling(case: dict[str, Any]) -> SamplingOptions:
    return SamplingOptions(case["temperature"], case["top_k"], case["top_p"])


def test_coins() -> None:
    for entry in _golden("sampler.json")["coins"]:
        rng = Rng(entry["seed"])
        assert [rng.coin() for _ in entry["values"]] == entry["values"]


def test_sampler() -> None:
    golden = _golden("sampler.json")
    for case in golden["cases"]:
        rng = Rng(case["seed"])
        logits = torch.tensor(golden["logits"][case["logits"]])
        assert [sample(logits, _sampling(case), rng) for _ in case["tokens"]] == case["tokens"], case


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
    """Each greedy id is the likeliest one after those before it, in one pass of the eager model."""
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
