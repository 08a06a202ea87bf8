import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export import inspect as command
from export.checkpoints.layouts import BUILT_IN
from export.planning.description import describe_checkpoint
from export.planning.plan import DEFAULT_CONTEXT, ExportOptions
from export.weights.gguf_types import QUANTIZE
from model.errors import InputError
from model.model import Llama
from tests.conftest import SMOLLM2, TOY, random_model, toy_model
from tests.support.checkpoints import hugging_face_state, save_safetensors, write_gguf, write_llama2c, write_meta

COUNT = sum(parameter.numel() for parameter in Llama(TOY).parameters())


def write_folder(folder: Path) -> Path:
    """Writes TOY as a Hugging Face folder in bfloat16, without a tokenizer."""
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": TOY.dim,
        "intermediate_size": TOY.hidden_dim,
        "num_hidden_layers": TOY.n_layers,
        "num_attention_heads": TOY.n_heads,
        "num_key_value_heads": TOY.n_kv_heads,
        "vocab_size": TOY.vocab_size,
        "max_position_embeddings": TOY.context,
        "rms_norm_eps": TOY.norm_eps,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    state = {name: tensor.bfloat16() for name, tensor in hugging_face_state(toy_model()).items()}
    save_safetensors(state, folder / "model.safetensors")
    return folder


def described(path: Path, **options: Any) -> dict[str, Any]:
    return describe_checkpoint(ExportOptions(checkpoint=path, **options))


LAYOUTS: dict[str, tuple[str, dict[str, int], Callable[[Path], Path]]] = {
    "Hugging Face": ("LlamaForCausalLM", {"BF16": 2 * COUNT}, lambda path: write_folder(path / "folder")),
    "GGUF": ("llama", {"F32": 4 * COUNT}, lambda path: write_gguf(toy_model(), path / "toy.gguf", "F32")),
    "llama2.c": ("llama", {"F32": 4 * COUNT}, lambda path: write_llama2c(toy_model(), path / "toy.bin", version=1)),
    "legacy": ("llama", {"F32": 4 * COUNT}, lambda path: write_llama2c(toy_model(), path / "toy.bin", version=0)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_described(name: str, tmp_path: Path) -> None:
    architecture, stored, write = LAYOUTS[name]
    found = described(write(tmp_path))
    assert found["architecture"] == architecture
    assert found["parameters"] == {"total": COUNT, "active": COUNT}
    assert found["stored_bytes"] == stored
    assert found["config"]["dim"] == TOY.dim
    assert found["max_seq_len"] == found["config"]["context"] == TOY.context
    assert [scheme["quantize"] for scheme in found["schemes"]] == list(QUANTIZE[:-1])
    assert found["default"] == "fp32"


def test_a_meta_folder_is_described(tmp_path: Path) -> None:
    untied = replace(TOY, tied=False)
    found = described(write_meta(random_model(untied), tmp_path / "meta", ranks=2))
    assert found["layout"] == "Meta folder"
    assert found["parameters"]["total"] == COUNT + TOY.vocab_size * TOY.dim
    assert found["stored_bytes"].keys() == {"F32"}
    assert found["max_seq_len"] == min(found["config"]["context"], DEFAULT_CONTEXT)


def test_types_of_a_gguf_and_the_default_that_keeps_them(tmp_path: Path) -> None:
    path = write_gguf(toy_model(), tmp_path / "q.gguf", lambda name: "Q8_0" if ".attention." in name else "F16")
    found = described(path)
    assert found["default"] == "gguf"
    assert found["stored_bytes"].keys() == {"Q8_0", "F16", "F32"}
    assert any("which become float32" in problem for problem in found["problems"])


def test_active_parameters_of_a_mixture_are_those_of_the_chosen_experts(tmp_path: Path) -> None:
    config = replace(TOY, n_experts=4, n_chosen_experts=1)
    found = described(write_gguf(random_model(config), tmp_path / "experts.gguf", "F32"))["parameters"]
    one = 3 * TOY.dim * TOY.hidden_dim * TOY.n_layers
    assert found["total"] - found["active"] == 3 * one


def test_what_is_missing_or_not_read_is_listed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    torch.save(dict[str, Tensor](), folder / "pytorch_model.bin")
    found = described(folder, max_seq_len=2 * TOY.context)
    assert found["ignored_files"] == ["pytorch_model.bin"]
    assert found["tokenizer"] == {"kind": "none", "bytes": 0}
    missing, long = found["problems"]
    assert missing.startswith("the checkpoint has no tokenizer; give export --tokenizer FILE")
    assert long.startswith(f"--max-seq-len {2 * TOY.context} is more than the {TOY.context} positions")
    wanted = ["llama-pte", "export", "--checkpoint", str(folder), "--tokenizer", "FILE", "--max-seq-len", "96"]
    assert shlex.split(found["command"]) == wanted


def test_the_built_in_model_has_nothing_to_complain_of() -> None:
    found = described(BUILT_IN)
    assert found["problems"] == found["ignored_files"] == []
    assert found["tokenizer"] == {"kind": "sentencepiece", "bytes": (BUILT_IN / "tokenizer.model").stat().st_size}


def test_smollm2_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    if not SMOLLM2.exists():
        pytest.fail(f"{SMOLLM2} does not exist; `make test` fetches it")
    assert command.main([str(SMOLLM2), "--max-seq-len", "4096"]) == 0
    text = capsys.readouterr().out
    for part in (
        "GGUF, llama",
        "134.5 million parameters",
        "30 layers, dim 576",
        "9 heads, 3 KV heads, head_dim 64",
        "vocabulary 49152, embedding and head tied",
        "8192 positions, rope theta 100000",
        "tokenizer.json; chat template: yes",
        "Q4_1 68.7%, Q8_0 31.1%",
        "weights as stored (default)",
        f"next: llama-pte export --checkpoint {SMOLLM2} --max-seq-len 4096",
    ):
        assert part in text
    assert "problem" not in text


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_llama2c(toy_model(), tmp_path / "toy.bin", version=1)
    assert command.main([str(path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(described(path)))


def test_an_adapter_needs_its_base_model(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    changed = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{changed}A.weight": torch.ones(2, TOY.dim), f"{changed}B.weight": torch.ones(TOY.dim, 2)}
    save_safetensors(tensors, adapter / "adapter_model.safetensors")
    found = described(write_folder(tmp_path / "folder"), lora=[str(adapter)])
    assert found["notes"] == ["adapter adapter is merged, scale 1"]
    assert f"--lora {adapter}" in found["command"]
    with pytest.raises(InputError, match=r"a LoRA adapter of org/base; .* --lora"):
        command.main([str(adapter)])


def test_what_export_refuses_is_refused(tmp_path: Path, toy_pte: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    with pytest.raises(InputError, match="unsupported architecture"):
        command.main([str(folder)])
    with pytest.raises(InputError, match="--max-seq-len 0 is invalid"):
        command.main([str(BUILT_IN), "--max-seq-len", "0"])
    with pytest.raises(InputError, match="--max-seq-len is for checkpoints"):
        command.main([str(toy_pte), "--max-seq-len", "16"])
