"""Checkpoints of random models, also of families that transformers does not have."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.families import Case


def save(case: Case, model: Any, folder: Path) -> None:
    """Saves the case's model as a checkpoint of its architecture."""
    model.save_pretrained(folder)
    if case.saved_as:
        settings = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
        settings, state = {"InternLM2ForCausalLM": _internlm2, "MiniCPMForCausalLM": _minicpm}[case.saved_as](
            settings, state
        )
        (folder / "config.json").write_text(json.dumps(settings | {"architectures": [case.saved_as]}))
        save_file(state, folder / "model.safetensors")


def _internlm2(settings: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns a Llama model as InternLM 2 stores it (internlm/internlm2-7b, modeling_internlm2.py): each KV head's
    query heads, key head and value head follow one another in wqkv.
    """
    names = {
        "embed_tokens": "tok_embeddings",
        "self_attn": "attention",
        "o_proj": "wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp": "feed_forward",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
        "lm_head": "output",
    }
    found = {
        ".".join(names.get(part, part) for part in name.split(".")): tensor
        for name, tensor in state.items()
        if name.split(".")[-2] not in ("q_proj", "k_proj", "v_proj")
    }
    heads = settings["num_key_value_heads"]
    for layer in range(settings["num_hidden_layers"]):
        parts = [state[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
        groups = [part.view(heads, -1, part.shape[1]) for part in parts]
        found[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(groups, dim=1).flatten(0, 1)
    return settings | {"bias": False}, found


def _minicpm(settings: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns a Granite model as MiniCPM describes it (openbmb/MiniCPM-2B-sft-bf16, modeling_minicpm.py): the factors
    of each block's terms and of the logits follow from a depth and a width.
    """
    kept = {key: value for key, value in settings.items() if "multiplier" not in key and key != "logits_scaling"}
    return kept | {"scale_emb": 6.0, "scale_depth": 0.7, "dim_model_base": 8}, state
