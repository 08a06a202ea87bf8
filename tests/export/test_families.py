"""Tests every family against transformers as an independent implementation, with random weights saved by
save_pretrained.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoints import tensor_files
from export.checkpoints.families import FAMILIES
from export.checkpoints.hf_config import config_of
from export.checkpoints.layouts import open_checkpoint
from export.llama import ExportOptions, export_llama
from export.lowering.trace import step
from model.config import ModelConfig
from model.errors import InputError
from model.model import Llama
from preproc.position_inputs import Positions, names
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng
from tests.conftest import MODELS
from tests.support.families import CASES, LLAMA_DIMS, Case, dimensions, hugging_face_model, layered_rope
from tests.support.saved import save

LENGTH = 64
"""Number of positions that the files are exported for."""


@torch.no_grad()
def full_forward(model: Any, tokens: list[int]) -> Tensor:
    """Returns transformers' logits [L, V] of a text, computed in one pass without caches."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


@torch.no_grad()
def eager(model: Llama, tokens: list[int]) -> Tensor:
    """Returns this project's logits [L, V], computed in one pass without caches."""
    positions = Positions.of(model.config, len(tokens))
    inputs = {name: positions.make(name, 0, len(tokens), capacity=0) for name in names(model.config)}
    return step(model, inputs | {"tokens": torch.tensor([tokens]), "select": torch.eye(len(tokens))[None]})["logits"][0]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = hugging_face_model(CASES[name])
    save(CASES[name], theirs, tmp_path)
    tokens = torch.randint(160, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = full_forward(theirs, tokens)
    ours = eager(open_checkpoint(tmp_path).build(), tokens)
    assert 1 < expected.abs().max() < 100
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", [name for name in FAMILIES if hasattr(transformers, name)])
def test_defaults_of_config_json_are_those_of_transformers(architecture: str) -> None:
    wide = {"hidden_size": 1280, "num_attention_heads": 160, "n_embd": 1024}  # valid for the defaults of every family
    few = {key: wide.get(key, value) for key, value in dimensions(architecture).items()}
    if "text_config" in few:
        few["text_config"] = {key: wide.get(key, value) for key, value in few["text_config"].items()}
    few["architectures"] = [architecture]
    theirs = getattr(transformers, architecture).config_class.from_dict(few)
    assert config_of(few, Path("few")) == config_of(json.loads(theirs.to_json_string(use_diff=False)), Path("all"))


def settings(name: str, folder: Path) -> dict[str, Any]:
    """Returns the config.json of a saved case."""
    save(CASES[name], hugging_face_model(CASES[name]), folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Gemma", {"hidden_act": "tanh"}, "sets hidden_act to 'tanh', which is unsupported; only 'silu' or"),
        ("Gemma 2", {"use_bidirectional_attention": True}, "sets use_bidirectional_attention to True"),
        ("Gemma 2", {"layer_types": ["chunked_attention"] * 3}, "sets layer_types to .*chunked"),
        ("Gemma 2", {"layer_types": ["full_attention"]}, "for each layer"),
        ("Gemma 2", {"query_pre_attn_scalar": 0}, "zero|0.0 cannot"),
        ("Granite", {"logits_scaling": "much"}, "not a number"),
        (
            "GPT-2",
            {"scale_attn_by_inverse_layer_idx": True},
            "sets scale_attn_by_inverse_layer_idx to True, which is unsupported; only False",
        ),
        ("GPT-2", {"add_cross_attention": True}, "sets add_cross_attention"),
        ("MPT", {"attn_config": {"clip_qkv": 6.0}}, "sets clip_qkv to 6.0"),
        ("MPT", {"attn_config": {"prefix_lm": True}}, "sets prefix_lm to True"),
        ("MPT", {"attn_config": {"qk_ln": True}}, "sets qk_ln to True"),
        ("MPT", {"attn_config": {"alibi": False}}, "sets alibi to False"),
        ("MPT", {"attn_config": 3}, "sets attn_config to a int, which is invalid"),
        ("MPT", {"expansion_ratio": 2}, "sets expansion_ratio to 2, which is unsupported; only 4"),
        ("MPT", {"logit_scale": "inv_sqrt_d_model"}, "sets logit_scale"),
        ("Mixtral", {"num_experts_per_tok": 5}, "n_chosen_experts is 5"),
        ("SmolLM 3", {"no_rope_layers": [1]}, "out of range"),
        ("Phi-3", {"rope_parameters": {"rope_type": "linear"}}, "lacks the key 'factor'"),
        ("Phi-3", {"rope_parameters": {"rope_type": "longrope"}}, "lacks the key 'short_factor'"),
        ("Phi-3", {"intermediate_size": 40}, r"gate_up_proj.* has the shape \[96, 32\], but .* needs \[80, 32\]"),
        ("GPT-2", {"n_inner": 40}, r"c_fc.weight .* the shape \[32, 128\], but its configuration needs \[32, 40\]"),
        ("CodeGen", {"n_layer": 4}, "lacks the weights transformer.h.3.attn.out_proj.weight, .* more"),
        ("Gemma", {"tie_word_embeddings": False}, "lacks the weights lm_head.weight"),
        ("Gemma 3", layered_rope({"rope_type": "linear", "factor": 2.0}), "scaling 'linear' of local blocks"),
        ("Mistral 3, language model", {"text_config": {"model_type": "ministral3"}}, "sets model_type to 'ministral3'"),
        ("Falcon", {"alibi": True}, "sets alibi to True"),
        ("StableLM", {"qk_layernorm": True}, "sets qk_layernorm to True"),
        ("OPT", {"do_layer_norm_before": False}, "sets do_layer_norm_before to False"),
        ("Llama 2", {"num_hidden_layers": 2}, r"architecture does not have: model.layers.2.* more"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings(name, tmp_path) | changes))
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_old_and_new_rotary_settings_of_gemma_3_mean_the_same() -> None:
    common = LLAMA_DIMS | {"architectures": ["Gemma3ForCausalLM"], "num_key_value_heads": 2}
    full = {"rope_type": "linear", "factor": 8.0}
    new = layered_rope({"rope_theta": 500.0}, rope_theta=1000.0, **full)
    types = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    old = {"rope_scaling": full, "rope_theta": 1000.0, "rope_local_base_freq": 500.0, "sliding_window_pattern": 2}
    assert config_of(common | old, Path("old")) == config_of(common | new | types, Path("new"))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_images_are_left_out_with_a_warning(prefix: str, tmp_path: Path) -> None:
    settings("Gemma 3, language model", tmp_path)
    expected = open_checkpoint(tmp_path).build().state_dict()
    state = load_file(tmp_path / "model.safetensors")
    renamed = {re.sub(r"^(model\.language_model|language_model\.model)\.", prefix, name): state[name] for name in state}
    save_file(renamed, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(found, expected[name]) for name, found in checkpoint.build().state_dict().items())
    (warning,) = checkpoint.warnings
    assert "only its language model is exported" in warning


def test_gpt2_with_openais_names_and_old_buffers_opens(tmp_path: Path) -> None:
    settings("GPT-2", tmp_path)
    expected = open_checkpoint(tmp_path).build().state_dict()
    state = load_file(tmp_path / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(state, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path).build().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["Phi-3", "GPT-2", "CodeGen", "MPT"])
def test_only_the_needed_rows_of_a_fused_tensor_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(name, tmp_path)
    read = list[Tensor]()
    monkeypatch.setattr(tensor_files, "_read_safetensors", _recording(tensor_files._read_safetensors, read))
    checkpoint = open_checkpoint(tmp_path)
    assert not read
    weight = checkpoint.weights["layers.1.attention.wk.weight"]
    assert sum(tensor.numel() for tensor in read) == weight.numel()


def _recording(function: Callable[..., Tensor], results: list[Tensor]) -> Callable[..., Tensor]:
    def call(*arguments: object) -> Tensor:
        results.append(function(*arguments))
        return results[-1]

    return call


@pytest.mark.parametrize("name", ["Phi-3", "GPT-2", "CodeGen", "Gemma"])
def test_fused_and_shifted_weights_may_be_half_precision_or_pickled(name: str, tmp_path: Path) -> None:
    settings(name, tmp_path)
    state = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file({key: tensor.float() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    expected = open_checkpoint(tmp_path).build().state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = open_checkpoint(tmp_path).build().state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


MIXED = {"Llama, dynamic scaling beyond", "Phi-3, LongRoPE beyond"}
"""Cases in which transformers' generate differs from its own forward: as the text grows, it changes the rotary
frequencies but keeps keys rotated by the earlier ones.
"""
PROMPT = [1, 17, 42, 99, 5, 6, 7, 8, 150, 3, 77]


def varied(case: Case) -> tuple[Any, list[int], list[Tensor]]:
    """Returns the case with the first seed whose text has more than a few different tokens, the 48 ids behind PROMPT,
    and their logits. A random model may fall into a loop, depending on transformers' version and on the processor.
    """
    for seed in range(1, 9):
        model = hugging_face_model(case, seed)
        text, rows = list(PROMPT), list[Tensor]()
        while len(rows) < 48:
            padded = text + [0] * (LENGTH - len(text))  # some kinds of rope scaling depend on the length
            rows.append(full_forward(model, padded)[len(text) - 1])
            text.append(int(rows[-1].argmax()))
        ids = text[len(PROMPT) :]
        if len(set(ids)) > 5:
            return model, ids, rows
    raise AssertionError(f"{case} repeats itself with eight seeds")


NORM_KERNELS = ("add", "mean", "mul", "rsqrt", "sub", "view_copy")
"""Kernels of the LayerNorm of embeddings, which XNNPACK does not take."""


def outside(config: ModelConfig, attention: str) -> set[str]:
    """Returns the kernels outside XNNPACK's delegates: those of the first block's input, and the attention operator."""
    scales = {"aten::mul.out"} if config.embedding_scale != 1 else set()
    adds = {"aten::add.out"} if config.positions == "learned" else set()
    ours = {"llama_pte::attention.out"} if attention == "fused" else set()
    slices = {"aten::slice_copy.Tensor_out"} if ours and config.local_rope_theta else set()
    norm = {f"aten::{name}.out" for name in NORM_KERNELS} if config.embedding_norm else set()
    return {"aten::embedding.out"} | scales | adds | ours | slices | norm


def exports() -> Iterator[Any]:
    """Yields every case with both implementations of attention; a mixture of experts supports only one."""
    for name, case in CASES.items():
        forms = ["aten"] if name.startswith("Mixtral") else ["fused", "aten"]
        for form in forms:
            is_fast = case.exported and form == forms[0]
            yield pytest.param(name, form, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "attention"), exports())
def test_an_export_gives_transformers_own_tokens_and_logits(
    name: str, attention: str, tmp_path: Path, runner: Path
) -> None:
    theirs, ids, rows = varied(CASES[name])
    save(CASES[name], theirs, tmp_path / "model")
    text = PROMPT + ids
    if name not in MIXED:
        assert theirs.generate(torch.tensor([PROMPT]), max_new_tokens=48, do_sample=False)[0].tolist() == text

    pte = export_llama(
        ExportOptions(
            checkpoint=tmp_path / "model",
            tokenizer=Path("none"),
            max_seq_len=LENGTH,
            prefill_chunk=7,
            attention=attention,
            output=MODELS / f"{name.replace(',', '').replace(' ', '-')}-{attention}.pte",
        )
    )
    program = Program(pte)
    steps = generate(Session(program), PROMPT, GenerationOptions(max_new_tokens=48), Rng(0))
    assert [step.token for step in steps] == ids
    assert set(program.metadata.requirements.operators) == outside(program.metadata.config, attention), (
        "all else is XNNPACK's"
    )
    session = Session(program)
    found = [session.prefill(PROMPT), *(session.decode(token) for token in ids[:-1])]
    torch.testing.assert_close(torch.stack(found), torch.stack(rows), atol=1e-4, rtol=0)
    prompt = ["--prompt-ids", ",".join(map(str, PROMPT)), "--max-new-tokens", "48", "--temperature", "0"]
    done = subprocess.run([runner, pte, "--format", "json", *prompt], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["token_ids"] == ids
