import re
from dataclasses import replace
from pathlib import Path

import pytest

from export.checkpoints.layouts import BUILT_IN, open_checkpoint
from export.planning.memory import memory_use
from export.planning.plan import ExportOptions
from export.planning.preview import KEPT, MEASURED, NOT_MEASURED, Preview, previews, quality
from export.weights.gguf_types import AS_STORED, QUANTIZE
from model.model import Llama
from runtime.engine.program import read_metadata
from tests.conftest import MODELS, ROOT, TOY, exported, toy_model
from tests.support.checkpoints import write_gguf, write_llama2c

EXPERTS = replace(TOY, hidden_dim=64, n_experts=4, n_chosen_experts=2)


def previewed(options: ExportOptions, text_bytes: int = 0) -> dict[str, Preview]:
    found = previews(open_checkpoint(options.checkpoint), options, text_bytes)
    return {preview.quantize: preview for preview in found}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("8da8w", "mixed")]


@pytest.mark.parametrize("quantize", ["fp32", "8da4w", "q4_k_m", *SLOW])
def test_sizes_and_memory_are_those_of_the_exported_file(quantize: str) -> None:
    options = ExportOptions(max_seq_len=512)
    name = "tiny.pte" if quantize == "fp32" else f"tiny-{quantize}.pte"
    pte = exported(replace(options, quantize=None if quantize == "fp32" else quantize, output=MODELS / name))
    found = previewed(options, (BUILT_IN / "tokenizer.model").stat().st_size)[quantize]
    assert found.file_bytes == pytest.approx(pte.stat().st_size, rel=0.02)
    assert found.memory == memory_use(read_metadata(pte))


def test_memory_grows_with_the_context() -> None:
    short, long = (previewed(ExportOptions(max_seq_len=length))["q4_0"].memory for length in (128, 256))
    assert long.caches == 2 * short.caches
    assert long.activations == short.activations, "fused attention works in chunks of the prompt"


def test_only_a_gguf_in_supported_types_can_be_kept(tmp_path: Path) -> None:
    checkpoint = write_llama2c(toy_model(), tmp_path / "toy.bin", version=1)
    assert list(previewed(ExportOptions(checkpoint=checkpoint))) == [name for name in QUANTIZE if name != AS_STORED]
    for kind, kept in (("F16", False), ("Q8_0", True)):
        types = {True: kind, False: "F16"}
        checkpoint = write_gguf(toy_model(), tmp_path / f"{kind}.gguf", lambda name, types=types: types[".wq." in name])
        assert (AS_STORED in previewed(ExportOptions(checkpoint=checkpoint))) == kept


def test_matrices_that_a_scheme_cannot_take_are_counted(tmp_path: Path) -> None:
    """The feed-forward of TOY is 48 wide, which is not a whole number of groups of 32."""
    checkpoint = write_llama2c(toy_model(), tmp_path / "toy.bin", version=1)
    found = previewed(ExportOptions(checkpoint=checkpoint))
    assert found["fp32"].unlike == found["8da8w"].unlike == {}
    assert found["8da4w"].unlike == {"8 bits a row": TOY.n_layers}
    assert found["q4_0"].unlike == {"float32": TOY.n_layers}
    blocks = 7 * TOY.n_layers + 1
    assert sum(found["q4_k_m"].unlike.values()) == blocks, "no row has 256 weights"


def test_experts_are_previewed_with_the_attention_that_they_get(tmp_path: Path) -> None:
    checkpoint = write_gguf(Llama(EXPERTS).eval().requires_grad_(False), tmp_path / "experts.gguf", "F32")
    found = previewed(ExportOptions(checkpoint=checkpoint))
    assert found["fp32"].memory.activations > found["q8_0"].memory.activations, "plain attention keeps its scores"
    assert "float32" not in found["8da8w"].unlike, "routers are float32 in every scheme"


def test_the_figures_behind_the_classes_are_those_of_the_document() -> None:
    _, _, table = (ROOT / "docs" / "quantisation.md").read_text().partition("### SmolLM2")
    rows = re.findall(r"^\| `([^ ]*)` \| [\d.]+ MB \| [\d.]+ \| \+([\d.]+)% \|", table, re.MULTILINE)
    assert {name: float(percent) / 100 for name, percent in rows} == pytest.approx(dict(MEASURED))


def test_classes_follow_from_the_figures() -> None:
    assert quality("fp32") == "as float32"
    assert quality("q8_0") == "nearly lossless"
    assert quality("8da8w") == "small loss"
    assert quality("q4_0") == "large loss in small models"
    assert quality("mxfp6") == NOT_MEASURED
    assert quality(AS_STORED) == KEPT
