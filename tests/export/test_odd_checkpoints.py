"""Tests unusual checkpoints, which are read as by their own library or refused with an explanation."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from export.checkpoints.layouts import open_checkpoint
from export.quality.eager import reference
from model.config import RopeScaling
from model.errors import InputError
from tests.conftest import TOY, random_model
from tests.support.checkpoints import write_meta
from tests.support.families import CASES, hugging_face_model

TEXT = [1, 17, 42, 99, 5, 6]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes a Hugging Face folder of an untied model."""
    hugging_face_model(CASES["Llama 2"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rename(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def same_logits(folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (found,) = reference(open_checkpoint(folder).build(), [TEXT])
    with torch.no_grad():
        torch.testing.assert_close(found, theirs(torch.tensor([TEXT])).logits[0], atol=1e-4, rtol=0)


def test_a_separate_head_is_used_despite_a_tied_configuration(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    assert not open_checkpoint(folder).config.tied
    same_logits(folder)


def test_a_head_that_equals_the_embedding_is_tied(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    rename(folder, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()})
    assert open_checkpoint(folder).config.tied
    same_logits(folder)


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight"])
def test_either_matrix_of_a_tied_pair_may_be_missing(absent: str, folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    rename(folder, lambda found: {name: tensor for name, tensor in found.items() if name != absent})
    assert open_checkpoint(folder).config.tied
    same_logits(folder)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "language_model."]
)
def test_prefixes_of_wrappers_are_removed(prefix: str, folder: Path) -> None:
    expected = open_checkpoint(folder).build().state_dict()
    rename(folder, lambda found: {prefix + name: tensor for name, tensor in found.items()})
    found = open_checkpoint(folder).build().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("is_tied", [True, False])
def test_metas_head_is_tied_where_it_equals_the_embedding(is_tied: bool, tmp_path: Path) -> None:
    model = random_model(TOY)
    if not is_tied:
        model.head.output.weight = torch.nn.Parameter(model.tok_embeddings.weight + 1)
    write_meta(model, tmp_path, 1)
    assert open_checkpoint(tmp_path).config.tied == is_tied


def test_an_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(
        InputError, match=r"a LoRA adapter of org/base; merge it first .* or give --checkpoint org/base --lora"
    ):
        open_checkpoint(tmp_path)


def write_gguf(path: Path, **fields: float | str | int) -> Path:
    """Writes a random model of one block with additional fields. Double underscores in their names stand for dots."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name.replace("__", "."), value)
    shapes = {"token_embd": (64, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({}, None),
        ({"llama__rope__scale_linear": 4.0}, 4.0),
        ({"llama__rope__scaling__factor": 4.0}, 4.0),
        ({"llama__rope__scaling__factor": 4.0, "llama__rope__scaling__type": "linear"}, 4.0),
        ({"llama__rope__scaling__factor": 4.0, "llama__rope__scaling__type": "none"}, None),
    ],
)
def test_every_key_of_ggufs_linear_scaling_counts(fields: dict[str, Any], factor: float | None, tmp_path: Path) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "a.gguf", **fields)).config
    assert config.rope_scaling == (RopeScaling("linear", factor, 256) if factor else None)


def test_a_gguf_may_rotate_a_part_of_each_head(tmp_path: Path) -> None:
    assert open_checkpoint(write_gguf(tmp_path / "a.gguf", llama__rope__dimension_count=4)).config.rotated == 4
    assert open_checkpoint(write_gguf(tmp_path / "b.gguf", llama__rope__dimension_count=8)).config.rotary_dim is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"split__count": 3, "split__no": 1},
            "is one of 3 parts, but not named as such; rename all parts to NAME-00001",
        ),
        (
            {"llama__rope__scaling__type": "dynamic", "llama__rope__scaling__factor": 4.0},
            "unsupported rope scaling 'dynamic'; give a file with linear",
        ),
    ],
)
def test_an_unsupported_gguf_is_refused_with_the_reason(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", **fields))


def test_a_type_that_no_longer_exists_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    data, name = path.read_bytes(), b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and the dimensions
    path.write_bytes(data[:at] + (31).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(
        InputError, match=r"stored as Q4_0_4_4 \(type 31\), which GGUF no longer has; give a file with another"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_bias": None, "mlp_bias": None, "rope_theta": None, "hidden_act": None, "tie_word_embeddings": None},
        {"max_position_embeddings": 64.0, "hidden_size": 32.0, "num_attention_heads": 4.0},
    ],
)
def test_null_means_absent_and_an_integer_may_be_written_as_a_float(settings: dict[str, Any], folder: Path) -> None:
    before = open_checkpoint(folder).config
    told = json.loads((folder / "config.json").read_text())
    changed = {key: float(told[key]) if isinstance(value, float) else value for key, value in settings.items()}
    configure(folder, **changed)
    assert open_checkpoint(folder).config == before


def test_gemmas_null_activation_is_its_own(tmp_path: Path) -> None:
    hugging_face_model(CASES["Gemma"]).save_pretrained(tmp_path / "model")
    configure(tmp_path / "model", hidden_act="gelu", hidden_activation=None)
    assert open_checkpoint(tmp_path / "model").config.activation == "gelu_tanh"
    same_logits(tmp_path / "model")


def test_a_head_of_wrong_shape_is_refused_despite_a_tied_configuration(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    rename(folder, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"][:-1].clone()})
    with pytest.raises(InputError, match=r"lm_head.weight in .* has the shape "):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "renamed.safetensors", "pytorch_model.bin", "weights.pt"])
def test_a_file_of_weights_is_read_with_the_configuration_beside_it(name: str, folder: Path) -> None:
    expected = open_checkpoint(folder).build().state_dict()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if name.endswith(".safetensors"):
        save_file(weights, folder / name, {"format": "pt"})
    else:
        torch.save(weights, folder / name)
    found = open_checkpoint(folder / name).build().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has weights but no config.json beside it; put the checkpoint's there"):
        open_checkpoint(folder / name)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_llama2_c_is_read(prefix: str, tmp_path: Path) -> None:
    """Writes a checkpoint as karpathy/llama2.c's train.py does."""
    folder = write_meta(random_model(TOY), tmp_path / "meta", 1)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    settings = json.loads((folder / "params.json").read_text())
    del settings["norm_eps"]
    content = {"model": {prefix + name: tensor for name, tensor in state.items()}, "iter_num": 3, "config": {"lr": 1.0}}
    torch.save(content | {"model_args": settings | {"max_seq_len": 48, "dropout": 0.0}}, tmp_path / "ckpt.pt")
    checkpoint = open_checkpoint(tmp_path / "ckpt.pt")
    assert (checkpoint.config.context, checkpoint.config.norm_eps) == (48, 1e-5)
    assert (checkpoint.bos_id, checkpoint.stop_ids) == (1, (1, 2))
    expected = open_checkpoint(folder).build().state_dict()
    found = checkpoint.build().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_metas_file_is_read_with_the_settings_beside_it(tmp_path: Path) -> None:
    folder = write_meta(random_model(TOY), tmp_path / "meta", 1)
    expected = open_checkpoint(folder)
    (folder / "consolidated.00.pth").rename(folder / "model.pth")
    assert open_checkpoint(folder / "model.pth").config == expected.config
    (folder / "params.json").unlink()
    with pytest.raises(InputError, match=r"has weights but no params.json beside it; put the checkpoint's there"):
        open_checkpoint(folder / "model.pth")
