"""Checkpoints as people have them: read as their own library reads them, or named for what they are."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from export.reference import reference
from model.checkpoint import open_checkpoint
from model.config import RopeScaling
from model.errors import InputError
from tests.checkpoints import write_meta
from tests.conftest import TOY, random_model
from tests.families import CASES, hugging_face_model

TEXT = [1, 17, 42, 99, 5, 6]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder that is not tied."""
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


def test_a_head_of_its_own_is_used_though_the_configuration_says_tied(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    assert not open_checkpoint(folder).config.tied
    same_logits(folder)


def test_a_head_that_equals_the_embedding_is_tied(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    rename(folder, lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()})
    assert open_checkpoint(folder).config.tied
    same_logits(folder)


@pytest.mark.parametrize("absent", ["lm_head.weight", "model.embed_tokens.weight"])
def test_of_a_tied_pair_either_may_be_stored(absent: str, folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    rename(folder, lambda found: {name: tensor for name, tensor in found.items() if name != absent})
    assert open_checkpoint(folder).config.tied
    same_logits(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_what_wrappers_put_before_names_is_taken_off(prefix: str, folder: Path) -> None:
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


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    ],
)
def test_a_quantised_checkpoint_is_named_for_what_it_is(settings: dict[str, Any], method: str, folder: Path) -> None:
    configure(folder, **settings)
    with pytest.raises(InputError, match=rf"is quantised \({method}\); give the unquantised checkpoint"):
        open_checkpoint(folder)


def test_an_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(InputError, match="a LoRA adapter of org/base; merge it first"):
        open_checkpoint(tmp_path)


def write_gguf(path: Path, **fields: float | str | int) -> Path:
    """A random model of one block, with these fields beside the usual ones; dots of a key are double underscores."""
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
        ({"split__count": 3, "split__no": 1}, "is part 2 of 3; merge them first: llama-gguf-split --merge"),
        (
            {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0},
            "rope scaling 'yarn'; only linear",
        ),
    ],
)
def test_a_gguf_that_cannot_be_read_is_named_for_what_it_is(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", **fields))


def test_a_type_that_no_longer_exists_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    data, name = path.read_bytes(), b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and the dimensions
    path.write_bytes(data[:at] + (31).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(InputError, match=r"stored as Q4_0_4_4 \(type 31\), which no longer exists; give another"):
        open_checkpoint(path)
