"""Tests every GGUF architecture against transformers' logits of the model that the file was written from, and against
llama.cpp's greedy ids on the same file.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from export.checkpoints.checkpoint import content_digest
from export.checkpoints.gguf_families import ARCHITECTURES
from export.checkpoints.layouts import open_checkpoint
from export.llama import export_llama
from export.planning.plan import ExportOptions
from model.errors import InputError
from runtime.engine.program import read_metadata
from tests.export.test_families import eager, full_forward
from tests.golden.gguf import GOLDEN, PROMPT
from tests.support.families import hugging_face_model
from tests.support.gguf_files import COMPARED, GGUF_CASES, write


@pytest.mark.parametrize("name", GGUF_CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = GGUF_CASES[name]
    theirs = hugging_face_model(case.case)
    checkpoint = open_checkpoint(write(case, tmp_path / "model.gguf", model=theirs))
    assert checkpoint.architecture == case.architecture
    tokens = torch.randint(160, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = full_forward(theirs, tokens)
    assert 1 < expected.abs().max() < 100
    torch.testing.assert_close(eager(checkpoint.build(), tokens), expected, atol=3e-4, rtol=0)


@pytest.mark.parametrize("name", COMPARED)
def test_greedy_ids_are_those_of_llama_cpp_on_the_same_file(name: str, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())["greedy"][name]
    path = write(GGUF_CASES[name], tmp_path / "model.gguf")
    if content_digest([path]) != golden["file"]:
        pytest.skip("this version of PyTorch makes other random weights; run tests.golden.gguf")
    tokens = PROMPT + golden["ids"]
    found = eager(open_checkpoint(path).build(), tokens)[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    steps = set(range(len(golden["ids"]))) - set(golden["close"])
    assert len(steps) > 12
    assert [found[step] for step in steps] == [golden["ids"][step] for step in steps]


@pytest.mark.parametrize("name", ["Llama", "Phi-3", "Falcon, two norms", "GPT-NeoX", "GLM-4"])
def test_matrices_in_one_tensor_keep_their_blocks(name: str, tmp_path: Path) -> None:
    case = GGUF_CASES[name]
    case = replace(case, case=replace(case.case, settings=case.case.settings | {"intermediate_size": 64}))
    checkpoint = open_checkpoint(write(case, tmp_path / "model.gguf", "Q8_0"))
    matrices = {key: weight for key, weight in checkpoint.weights.items() if weight.dim() == 2}
    assert checkpoint.blocks.keys() == matrices.keys()
    for key, blocks in checkpoint.blocks.items():
        found = dequantize(blocks.read().numpy(), GGMLQuantizationType[blocks.kind])
        assert torch.equal(torch.from_numpy(found.copy()), matrices[key]), key


def test_a_model_of_another_architecture_than_llama_is_exported(tmp_path: Path) -> None:
    """Exporting verifies the logits."""
    path = write(GGUF_CASES["Gemma 3"], tmp_path / "model.gguf")
    metadata = read_metadata(export_llama(ExportOptions(path, Path("none"), tmp_path / "out", max_seq_len=32)))
    assert metadata.provenance["verified"]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Granite", {"rope.scaling.finetuned": False}, "sets granite.rope.scaling.finetuned to False, .* only True"),
        ("MPT", {"attention.clamp_kqv": 6.0}, "sets mpt.attention.clamp_kqv to 6.0"),
        ("Mistral 3", {"attention.temperature_scale": 0.5}, "sets mistral3.attention.temperature_scale to 0.5"),
        (
            "Qwen 2",
            {"rope.scaling.type": "longrope"},
            r"lacks the key 'rope_factors_short\.weight'",
        ),
        ("GPT-NeoX", {"use_parallel_residual": None}, "lacks the key 'gptneox.use_parallel_residual'"),
        ("Cohere 2", {"attention.sliding_window_pattern": [True]}, "has an invalid dimension"),
        (
            "Phi-2",
            {"attention.head_count_kv": 2},
            r"attn_k.weight .* \[32, 32\], but .* needs \[16, 32\]",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = GGUF_CASES[name]
    path = write(replace(case, fields={**case.fields, **fields}), tmp_path / "model.gguf")
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_every_architecture_has_a_case() -> None:
    assert {case.architecture for case in GGUF_CASES.values()} == set(ARCHITECTURES)
