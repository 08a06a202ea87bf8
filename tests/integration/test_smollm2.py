"""Tests a real instruct model from checkpoint to text: its ids must be those of transformers on the same file."""

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from export.llama import export_llama
from export.planning.plan import ExportOptions
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions, generate
from runtime.text.prompts import prompt_ids
from runtime.text.sampler import Rng
from tests.conftest import MODELS, SMOLLM2, exported

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees Celsius. At high altitude",
    "Die Hauptstadt von Deutschland ist",
)


END = 2
"""<|im_end|>, the stop token of the checkpoint."""


def before_end(ids: list[int]) -> list[int]:
    """Returns the ids before END."""
    return ids[: ids.index(END)] if END in ids else ids


class Theirs(NamedTuple):
    """The model and tokenizer in transformers."""

    model: Any
    tokenizer: Any

    def greedy(self, prompt: str, count: int) -> tuple[list[int], list[int]]:
        """Returns the ids of a prompt, and up to `count` greedy ids that follow it before END."""
        ids = self.tokenizer(prompt).input_ids
        text = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return ids, before_end(text[0].tolist()[len(ids) :])


@pytest.fixture(scope="module")
def theirs() -> Theirs:
    if not SMOLLM2.exists():
        pytest.fail(f"{SMOLLM2} does not exist; `make test` fetches it")
    load = {"pretrained_model_name_or_path": SMOLLM2.parent, "gguf_file": SMOLLM2.name}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # otherwise the model cannot be saved
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(quantised.state_dict())
    return Theirs(model, transformers.AutoTokenizer.from_pretrained(**load))


@pytest.fixture(scope="module")
def gguf_pte(theirs: Theirs) -> Path:
    """In float32, as transformers runs it."""
    options = ExportOptions(checkpoint=SMOLLM2, quantize="fp32", max_seq_len=256, output=MODELS / "SmolLM2-gguf.pte")
    return exported(options)


@pytest.fixture(scope="module")
def folder(theirs: Theirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the same weights as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("smollm2") / "SmolLM2"
    theirs.model.save_pretrained(path)
    theirs.tokenizer.save_pretrained(path)
    return path


def ours(pte: Path, prompt: str, count: int) -> tuple[list[int], list[int]]:
    program = Program(pte)
    ids = prompt_ids(program, prompt)
    steps = generate(Session(program), ids, GenerationOptions(max_new_tokens=count), Rng(0))
    return ids, before_end([step.token for step in steps])


def runner_ids(runner: Path, pte: Path, prompt: str, count: int) -> tuple[list[int], list[int]]:
    command = [runner, pte, "--prompt", prompt, "--max-new-tokens", str(count), "--format", "json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return found["prompt_ids"], before_end(found["token_ids"])


def test_the_float32_export_of_the_gguf_gives_transformers_ids(theirs: Theirs, gguf_pte: Path) -> None:
    for prompt in PROMPTS[:2]:
        assert ours(gguf_pte, prompt, 32) == theirs.greedy(prompt, 32), prompt


@pytest.mark.slow
def test_the_folder_gives_transformers_ids_in_both_languages(theirs: Theirs, folder: Path, runner: Path) -> None:
    pte = export_llama(ExportOptions(checkpoint=folder, max_seq_len=256, output=folder.parent / "folder.pte"))
    for prompt in PROMPTS:
        expected = theirs.greedy(prompt, 64)
        assert ours(pte, prompt, 64) == expected, prompt
        assert runner_ids(runner, pte, prompt, 64) == expected, prompt


@pytest.mark.slow
def test_the_default_export_keeps_the_ggufs_blocks_and_gives_the_same_ids_in_both_languages(
    runner: Path, tmp_path: Path
) -> None:
    pte = export_llama(ExportOptions(checkpoint=SMOLLM2, max_seq_len=256, output=tmp_path / "own.pte"))
    assert pte.stat().st_size == pytest.approx(SMOLLM2.stat().st_size, rel=0.01)
    assert Program(pte).metadata.provenance["options"]["quantize"] == "gguf"
    for prompt in PROMPTS:
        assert ours(pte, prompt, 64) == runner_ids(runner, pte, prompt, 64), prompt


@pytest.mark.slow
def test_eight_bits_are_written_and_verified(tmp_path: Path) -> None:
    pte = export_llama(ExportOptions(checkpoint=SMOLLM2, quantize="8da8w", max_seq_len=256, output=tmp_path / "8.pte"))
    assert Program(pte).metadata.provenance["verified"]
