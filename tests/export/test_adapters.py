"""Tests adapters against PEFT, which trains and merges them, on small random models."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export import verify as verify_command
from export.checkpoints import hub
from export.checkpoints.adapters import open_adapters
from export.checkpoints.layouts import open_checkpoint
from export.llama import ExportOptions, export_llama
from export.quality.eager import reference
from model.errors import InputError
from runtime.engine.program import Program
from runtime.engine.session import Session
from tests.support.families import CASES, hugging_face_model

TEXT = [1, 17, 42, 99, 5, 6]
LINEAR = ["q_proj", "v_proj", "down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's advice on training


def adapted(base: str, folder: Path, seed: int = 1, **settings: Any) -> Any:
    """Writes a random model as folder/base and a random adapter of it as folder/adapter, and returns PEFT's model."""
    model = hugging_face_model(CASES[base])
    if not (folder / "base").exists():
        model.save_pretrained(folder / "base")
    torch.manual_seed(seed)
    found = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **settings))
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    found.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return found.eval()


def with_adapters(folder: Path, *given: str) -> Any:
    return open_checkpoint(folder / "base", adapters=open_adapters(given or [f"{folder / 'adapter'}"]))


@torch.no_grad()
def same_logits(folder: Path, theirs: Any) -> None:
    (found,) = reference(with_adapters(folder).build(), [TEXT])
    torch.testing.assert_close(found, theirs(torch.tensor([TEXT])).logits[0], atol=1e-4, rtol=0)


def same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("Llama 2", {"target_modules": LINEAR}),
        ("Llama 2", {"target_modules": LINEAR, "lora_alpha": 3, "use_rslora": True}),
        ("Llama 2", {"target_modules": "all-linear", "use_dora": True}),
        (
            "Llama 2",
            {
                "target_modules": LINEAR,
                "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
                "alpha_pattern": {"v_proj": 5, r"layers\.[02]\.mlp\..*": 7},
            },
        ),
        ("Llama 2", {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
        ("Llama 2", {"target_modules": ["q_proj"], "layers_to_transform": [1], "modules_to_save": ["down_proj"]}),
        ("Llama 2", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("Llama 2", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
        ("Llama 2", {"target_modules": LINEAR, "trainable_token_indices": [3, 17, 99]}),
        ("Llama 2", {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [17], "lm_head": [5, 2]}}),
        ("Llama with biases", {"target_modules": LINEAR, "bias": "all"}),
        ("Llama with biases", {"target_modules": LINEAR, "lora_bias": True}),
        ("GPT-2, unscaled, wide, untied", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        ("GPT-2, unscaled, wide, untied", {"target_modules": ["c_attn", "lm_head"], "use_dora": True}),
        ("Phi-3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
        ("CodeGen", {"target_modules": ["qkv_proj", "fc_in"]}),
        ("Gemma 2", {"target_modules": LINEAR, "modules_to_save": ["pre_feedforward_layernorm"]}),
    ],
)
def test_merged_weights_are_pefts(base: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = adapted(base, tmp_path, **settings)
    same_logits(tmp_path, theirs)
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    same_weights(
        with_adapters(tmp_path).build().state_dict(), open_checkpoint(tmp_path / "merged").build().state_dict()
    )


@pytest.mark.parametrize(
    ("settings", "stays_tied"),
    [
        ({"target_modules": LINEAR}, True),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": LINEAR, "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": LINEAR, "trainable_token_indices": [3, 17]}, True),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ],
)
def test_a_tied_pair_is_separated_where_the_adapter_was_trained_on_one_of_them(
    settings: dict[str, Any], stays_tied: bool, tmp_path: Path
) -> None:
    theirs = adapted("Llama 3.2, tied and scaled", tmp_path, **settings)
    assert with_adapters(tmp_path).config.tied == stays_tied
    same_logits(tmp_path, theirs)


def test_adapters_are_merged_one_after_another_with_their_scales(tmp_path: Path) -> None:
    for number, modules in enumerate((LINEAR, ["q_proj", "embed_tokens"])):
        adapted("Llama 2", tmp_path, number, target_modules=modules)
        (tmp_path / "adapter").rename(tmp_path / f"adapter{number}")
    theirs = peft.PeftModel.from_pretrained(hugging_face_model(CASES["Llama 2"]), tmp_path / "adapter0", "first")
    theirs.load_adapter(tmp_path / "adapter1", "second")
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "second" in module.scaling:
            module.set_scale("second", -0.5)
    theirs.base_model.set_adapter(["first", "second"])
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = with_adapters(tmp_path, f"{tmp_path / 'adapter0'}", f"{tmp_path / 'adapter1'}:-0.5")
    same_weights(found.build().state_dict(), open_checkpoint(tmp_path / "merged").build().state_dict())


def test_a_pickled_adapter_in_half_precision_is_merged_into_a_base_without_prefixes(tmp_path: Path) -> None:
    adapted("GPT-2", tmp_path, target_modules=["c_attn"])
    weights = {
        name: tensor.half() for name, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
    }
    save_file(
        {name: tensor.float() for name, tensor in weights.items()}, tmp_path / "adapter/adapter_model.safetensors"
    )
    expected = with_adapters(tmp_path).build().state_dict()
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter/adapter_model.bin")
    base = load_file(tmp_path / "base/model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in base.items()},
        tmp_path / "base/model.safetensors",
    )
    same_weights(with_adapters(tmp_path).build().state_dict(), expected)


def test_an_export_with_adapters_generates_pefts_tokens_and_is_verified_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = adapted("Llama 2", tmp_path, target_modules=LINEAR, use_dora=True)
    lora = f"{tmp_path / 'adapter'}:0.5"
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(0.5)
    merged = theirs.merge_and_unload()
    options = ExportOptions(
        checkpoint=tmp_path / "base", lora=[lora], tokenizer=Path("none"), max_seq_len=64, output=tmp_path / "a.pte"
    )
    pte = export_llama(options)
    program = Program(pte)
    session = Session(program)
    ids = [int(session.prefill(TEXT).argmax())]
    while len(ids) < 24:
        ids.append(int(session.decode(ids[-1]).argmax()))
    expected = merged.generate(torch.tensor([TEXT]), max_new_tokens=24, do_sample=False)[0].tolist()
    assert TEXT + ids == expected
    (record,) = program.metadata.provenance["adapters"]
    assert record == {"name": "adapter", "scale": 0.5, "sha256": open_adapters([lora])[0].sha256}

    arguments = [str(pte), "--checkpoint", str(tmp_path / "base")]
    assert verify_command.main([*arguments, "--lora", lora]) == 0
    assert "passed" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"made with --lora adapter:0\.5, unlike the adapters given"):
        verify_command.main(arguments)
    with pytest.raises(InputError, match=r"made with --lora adapter:0\.5, unlike the adapters given"):
        verify_command.main([*arguments, "--lora", str(tmp_path / "adapter")])


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_an_adapter_beside_its_base_must_be_merged_or_moved(tmp_path: Path) -> None:
    adapted("Llama 2", tmp_path, target_modules=LINEAR)
    expected = with_adapters(tmp_path).build().state_dict()
    for file in (tmp_path / "adapter").glob("adapter_*"):
        file.rename(tmp_path / "base" / file.name)
    for path in (tmp_path / "base", tmp_path / "base/model.safetensors"):
        with pytest.raises(InputError, match=r"an? LoRA adapter beside the base model; give --lora .*base to merge it"):
            open_checkpoint(path)
    same_weights(with_adapters(tmp_path, f"{tmp_path / 'base'}").build().state_dict(), expected)


def test_an_adapter_on_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted("Llama 2", tmp_path, target_modules=LINEAR)
    monkeypatch.setattr(hub, "download_adapter", lambda *arguments: tmp_path / "adapter")
    (found,) = open_adapters(["org/adapter:2"])
    assert (found.name, found.scale, found.path) == ("org/adapter", 2.0, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "of the unsupported type LOHA; only LORA can be merged"),
        ({"peft_type": None}, "of the unsupported type None"),
        (
            {"use_qalora": True, "layer_replication": [[0, 1]]},
            "layer_replication, use_qalora, which cannot",
        ),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights to 'pissa', which changes the base model"),
        ({"r": 5}, r"shapes \[4, 32\] and \[32, 4\] for model.layers.0.self_attn.q_proj, which are not of rank 5"),
        ({"lora_alpha": "much"}, "adapter_config.json is damaged"),
        ({"rank_pattern": [3]}, "adapter_config.json is damaged"),
        ({"trainable_token_indices": 3}, "adapter_config.json is damaged"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_in_one_sentence(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapted("Llama 2", tmp_path, target_modules=["q_proj"])
    configure(tmp_path / "adapter", **settings)
    with pytest.raises(InputError, match=message) as caught:
        open_adapters([f"{tmp_path / 'adapter'}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (
            "Llama with biases",
            {"target_modules": LINEAR, "lora_bias": True},
            "down_proj.bias, which .* does not have",
        ),
        ("Phi-3", {"target_modules": ["qkv_proj"]}, "changes model.layers.0.self_attn.qkv_proj, .* which"),
        (
            "Llama, wide heads",
            {"target_modules": LINEAR},
            r"q_proj.weight .* shape \[48, 32\], .* needs \[32, 32\]",
        ),
        (
            "Llama, wide heads",
            {"target_modules": ["o_proj"], "modules_to_save": ["q_proj"]},
            r"_proj.weight with the shape .*; give the base model that it was trained on",
        ),
    ],
)
def test_an_adapter_of_another_base_is_refused_in_one_sentence(
    base: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapted(base, tmp_path, **settings)
    hugging_face_model(CASES["Llama 2"]).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=message) as caught:
        with_adapters(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_peft_adapter_is_refused_by_name(tmp_path: Path, toy_bin: Path) -> None:
    adapted("Llama 2", tmp_path, target_modules=LINEAR, trainable_token_indices=[7])
    adapter = tmp_path / "adapter"
    with pytest.raises(InputError, match=r"needs a Hugging Face checkpoint, but .* is of the layout llama2.c"):
        open_checkpoint(toy_bin, adapters=open_adapters([f"{adapter}"]))
    with pytest.raises(InputError, match=r"has the scale 'half', which is not a number; give FOLDER or FOLDER:0.5"):
        open_adapters([f"{adapter}:half"])
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"is a GGUF adapter, which is unsupported"):
        open_adapters([f"{tmp_path / 'lora.gguf'}"])
    with pytest.raises(InputError, match=r"base is no PEFT adapter: it lacks adapter_config.json or"):
        open_adapters([f"{tmp_path / 'base'}"])
    configure(adapter, trainable_token_indices=[160])
    with pytest.raises(InputError, match=r"trains the token 160, but model.embed_tokens.weight has 160 rows"):
        with_adapters(tmp_path)
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.model.layers.0.mlp.up_proj.lora_E": torch.ones(1)}, path)
    with pytest.raises(InputError, match="lora_E, which is not a tensor of a LoRA adapter"):
        open_adapters([f"{adapter}"])
