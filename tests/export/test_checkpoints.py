import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from export.checkpoints.checkpoint import half_split, renamed
from export.checkpoints.layouts import BUILT_IN, Checkpoint, open_checkpoint
from export.checkpoints.weight_names import HUGGING_FACE_NAMES
from export.lowering.trace import GraphOptions
from export.weights.scheme import SCHEMES
from export.weights.source import WeightSource
from model.errors import InputError
from model.model import Llama
from tests.conftest import TOY, planned, random_model, write_pte
from tests.support.checkpoints import (
    hugging_face_state,
    interleaved,
    save_safetensors,
    write_gguf,
    write_llama2c,
    write_meta,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": TOY.dim,
    "num_hidden_layers": TOY.n_layers,
    "num_attention_heads": TOY.n_heads,
    "num_key_value_heads": TOY.n_kv_heads,
    "head_dim": TOY.head_dim,
    "intermediate_size": TOY.hidden_dim,
    "vocab_size": TOY.vocab_size,
    "max_position_embeddings": TOY.context,
    "rms_norm_eps": TOY.norm_eps,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes TOY as a Hugging Face folder."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_safetensors(hugging_face_state(random_model(TOY)), tmp_path / "model.safetensors")
    return tmp_path


def same_weights(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    built = checkpoint.build().state_dict()
    assert built.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(built[name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_llama2c_files_survive_a_round_trip(tmp_path: Path, version: int, tied: bool) -> None:
    model = random_model(replace(TOY, tied=tied, context=40 if version else TOY.context))
    checkpoint = open_checkpoint(write_llama2c(model, tmp_path / "model.bin", version))
    assert checkpoint.config == model.config
    assert (checkpoint.bos_id, checkpoint.stop_ids) == (1, (1, 2))
    same_weights(checkpoint, model.state_dict())


def test_the_real_checkpoints_two_layouts_hold_the_same_weights(shared: Path) -> None:
    legacy, version_1 = (open_checkpoint(shared / "stories260K" / f"stories260K{v}.bin") for v in ("", "_v1"))
    assert legacy.config == version_1.config
    assert (legacy.config.dim, legacy.config.n_layers, legacy.config.vocab_size) == (64, 5, 512)
    same_weights(legacy, version_1.build().state_dict())


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_half_split_undoes_interleaving(heads: int) -> None:
    weight = torch.randn(heads * 8, 5)
    assert torch.equal(half_split(interleaved(weight, heads), heads, rotated=8), weight)


def test_half_split_leaves_the_rows_that_are_not_rotated() -> None:
    weight = torch.arange(16.0).view(16, 1)
    expected = [0, 2, 1, 3, *range(4, 8), 8, 10, 9, 11, *range(12, 16)]
    assert half_split(weight, 2, rotated=4).flatten().tolist() == expected


def test_names_translate_both_ways() -> None:
    back = {theirs: ours for ours, theirs in HUGGING_FACE_NAMES.items()}
    name = "layers.11.attention.wq.weight"
    assert renamed(name, HUGGING_FACE_NAMES) == "model.layers.11.self_attn.q_proj.weight"
    assert renamed(renamed(name, HUGGING_FACE_NAMES), back) == name


@pytest.mark.parametrize("files", [1, 3])
def test_a_hugging_face_folder_opens_whole_or_split(folder: Path, files: int) -> None:
    state = load_file(folder / "model.safetensors")
    if files > 1:
        (folder / "model.safetensors").unlink()
        parts = {name: f"model-{i % files}.safetensors" for i, name in enumerate(state)}
        for part in set(parts.values()):
            save_safetensors({n: t for n, t in state.items() if parts[n] == part}, folder / part)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == TOY
    assert (checkpoint.bos_id, checkpoint.stop_ids) == (1, (2,))
    same_weights(checkpoint, random_model(TOY).state_dict())


def test_half_precision_weights_become_float32(folder: Path) -> None:
    state = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_safetensors(state, folder / "model.safetensors")
    expected = {n: t.bfloat16().float() for n, t in random_model(TOY).state_dict().items()}
    same_weights(open_checkpoint(folder), expected)


def test_generation_config_wins_and_its_stop_ids_join_the_others(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": [8, 9]}))
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.bos_id, checkpoint.stop_ids) == (7, (8, 9, 2))


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_rope_scaling_are_read(folder: Path, spelling: dict[str, dict[str, object]]) -> None:
    factors = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for value in spelling.values():
        if isinstance(value, dict):
            value.update(factors)
    (folder / "config.json").write_text(json.dumps(CONFIG | spelling))
    config = open_checkpoint(folder).config
    assert config.rope_theta == 5e5
    assert config.rope_scaling is not None
    assert (config.rope_scaling.factor, config.rope_scaling.original_context) == (8.0, 64)


def test_the_digest_depends_on_content_not_on_the_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "elsewhere")
    assert open_checkpoint(copy).digest() == open_checkpoint(folder).digest()
    state = load_file(copy / "model.safetensors")
    state["model.norm.weight"][3] += 1
    save_safetensors(state, copy / "model.safetensors")
    assert open_checkpoint(copy).digest() != open_checkpoint(folder).digest()


META = replace(TOY, tied=False, context=4096)


@pytest.mark.parametrize("vocabulary_parallel", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_meta_folder_opens_whole_or_split_over_ranks(tmp_path: Path, ranks: int, vocabulary_parallel: bool) -> None:
    model = random_model(META)
    checkpoint = open_checkpoint(write_meta(model, tmp_path, ranks, vocabulary_parallel))
    assert checkpoint.config == META
    same_weights(checkpoint, model.state_dict())


def test_four_meta_ranks_hold_the_unsplit_weights(tmp_path: Path) -> None:
    model = random_model(replace(META, n_heads=8, n_kv_heads=4, head_dim=4))
    same_weights(open_checkpoint(write_meta(model, tmp_path, 4)), model.state_dict())


@pytest.mark.parametrize(
    ("params", "context", "factor"),
    [
        ({}, 4096, None),
        ({"rope_theta": 500000.0}, 8192, None),
        ({"rope_theta": 1000000.0}, 16384, None),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, 131072, 32.0),
        ({"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 8}, 131072, 8.0),
    ],
)
def test_a_meta_models_context_and_scaling_follow_from_its_rotary_settings(
    tmp_path: Path, params: dict[str, object], context: int, factor: float | None
) -> None:
    write_meta(random_model(META), tmp_path, 1)
    settings = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(settings | params))
    config = open_checkpoint(tmp_path).config
    assert config.context == context
    assert (config.rope_scaling and config.rope_scaling.factor) == factor


def test_damaged_meta_folders_are_refused(tmp_path: Path) -> None:
    write_meta(random_model(META), tmp_path, 2)
    second = tmp_path / "consolidated.01.pth"
    whole = second.read_bytes()
    second.write_bytes(whole[:3000])
    with pytest.raises(InputError, match=r"consolidated\.01\.pth is truncated"):
        open_checkpoint(tmp_path)
    second.rename(tmp_path / "consolidated.02.pth")
    with pytest.raises(InputError, match=r"lacks consolidated\.01\.pth"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.02.pth").unlink()
    with pytest.raises(InputError, match=re.escape("has the shape [16, 32], but its configuration needs [32, 32]")):
        open_checkpoint(tmp_path)


def stored(tensor: Tensor, kind: str) -> Tensor:
    """Returns a weight after rounding to GGUF's storage type; norms stay float32."""
    values, storage = tensor.contiguous().numpy(), gguf.GGMLQuantizationType[kind]
    if tensor.dim() == 1 or kind == "F32":
        return tensor
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, storage), storage))


def layouts(model: Llama, folder: Path, tmp_path: Path, kind: str) -> Iterator[Path]:
    """Writes a model in each layout and yields its path: 1, 2 and 4 Meta ranks, GGUF, and 1 and 3 files of Hugging
    Face's.
    """
    for ranks in (1, 2, 4):
        yield write_meta(model, tmp_path / f"meta{ranks}", ranks)
    yield write_gguf(model, tmp_path / "model.gguf", kind)
    names = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads"}
    names |= {"head_dim": "head_dim", "intermediate_size": "hidden_dim"}
    settings = {theirs: getattr(model.config, ours) for theirs, ours in names.items()} | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(CONFIG | settings))
    state = hugging_face_state(model)
    save_safetensors(state, folder / "model.safetensors")
    yield folder
    parts = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(state)}
    for part in set(parts.values()):
        save_safetensors({name: t for name, t in state.items() if parts[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    yield folder


def representable(kind: str) -> Llama:
    """Returns a model whose weights are exact in a GGUF storage type."""
    model = random_model(replace(META, dim=64, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=64))
    model.load_state_dict({name: stored(tensor, kind) for name, tensor in model.state_dict().items()})
    return model


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_one_checkpoint_is_the_same_to_the_bit_in_every_layout(folder: Path, tmp_path: Path, kind: str) -> None:
    model = representable(kind)
    for path in layouts(model, folder, tmp_path, kind):
        same_weights(open_checkpoint(path), model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "quantize"), [("F16", "fp32"), ("Q8_0", "8da4w")])
def test_one_checkpoint_exports_to_the_same_bytes_from_every_layout(
    folder: Path, tmp_path: Path, kind: str, quantize: str
) -> None:
    model = representable(kind)
    plan = planned(model, GraphOptions(16, 1), SCHEMES[quantize])
    expected = write_pte(plan, tmp_path / "whole.pte", "xnnpack").read_bytes()
    for path in layouts(model, folder, tmp_path, kind):
        source = WeightSource(model.config, open_checkpoint(path).weights, plan.source.scheme)
        again = write_pte(replace(plan, source=source), tmp_path / "again.pte", "xnnpack")
        assert again.read_bytes() == expected, path


class Malicious:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch executed",)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_meta(random_model(META), tmp_path, 1)
    torch.save({"norm.weight": Malicious()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(InputError, match="could run code") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hugging_face_folder_may_be_pickled(folder: Path, zipped: bool) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    same_weights(open_checkpoint(folder), random_model(TOY).state_dict())


def edit_config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | changes)) and None  # type: ignore[func-returns-value]


def edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_safetensors(state, folder / "model.safetensors")

    return edit


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_weights(lambda s: s.pop("model.norm.weight")), "lacks the weights model.norm.weight"),
        (edit_weights(lambda s: s.update(extra=torch.ones(1))), "its architecture does not have: extra"),
        (edit_weights(lambda s: s.update({"model.norm.weight": torch.ones(3)})), r"model.norm.weight .*\[3\].*\[32\]"),
        (truncate("model.safetensors", 5000), "truncated or not a safetensors file"),
        (truncate("config.json", 20), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "contains a list, not an object"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "neither model.safetensors, pytorch_model.bin nor",
        ),
        (edit_config(architectures=["MambaForCausalLM"]), "unsupported architecture .*Mamba"),
        (edit_config(hidden_act="quick_gelu"), "sets hidden_act to 'quick_gelu', which is unsupported; only 'silu'"),
        (edit_config(architectures=["LlamaForCausalLM", "MptForCausalLM"]), "unsupported architecture"),
        (edit_config(architectures=[[]]), "unsupported architecture"),
        (edit_config(attention_bias=True), "lacks the weights model.layers.0.self_attn.k_proj.bias"),
        (edit_config(attention_bias="some"), "qkv_bias is 'some'"),
        (edit_config(rope_scaling={"rope_type": "fire"}), "rope scaling 'fire'; supported are default, llama3"),
        (edit_config(rope_scaling={"rope_type": "linear"}), "lacks the key 'factor'"),
        (edit_config(rope_scaling={"rope_type": "linear", "factor": "much"}), "could not convert"),
        (edit_config(rope_scaling={"full_attention": {}}), "without nested objects"),
        (edit_config(partial_rotary_factor=0.5), "sets partial_rotary_factor to 0.5; its architecture supports only 1"),
        (edit_config(num_attention_heads=0), "has a dimension that is not a number|n_heads is 0"),
        (edit_config(hidden_size="wide"), "dim is 'wide'|not a number"),
        (edit_config(vocab_size=-5), "vocab_size is -5"),
        (edit_config(num_hidden_layers=10**9), "n_layers is 1000000000"),
        (edit_config(rope_scaling="x"), "sets its rope scaling to 'x'"),
        (edit_config(bos_token_id=2.0), "sets bos_token_id to 2.0; ids must be whole numbers from 0 to 2047"),
        (edit_config(eos_token_id=[2, 99999]), "sets eos_token_id to"),
        (edit_weights(lambda s: s.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)})), "or integer"),
        (lambda folder: (folder / "config.json").write_text("[" * 100000), "config.json is not JSON"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'), "no weight_map"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "hidden_size"}))
    with pytest.raises(InputError, match="lacks the key 'hidden_size'"):
        open_checkpoint(folder)


def test_a_part_that_the_index_names_must_be_there(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-7.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=re.escape("lacks model-7.safetensors, which its index names")):
        open_checkpoint(folder)


@pytest.mark.parametrize("version", [0, 1])
def test_a_llama2c_file_of_wrong_length_is_refused_with_both_lengths(tmp_path: Path, version: int) -> None:
    path = write_llama2c(random_model(TOY), tmp_path / "model.bin", version)
    whole = path.read_bytes()
    for content, problem in ((whole[:-100], "truncated"), (whole + b"1234", "too long")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"is {problem}: it has {len(content)} bytes, .* need {len(whole)}"):
            open_checkpoint(path)


def test_other_llama2c_versions_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<Ii", 0x616B3432, 2).ljust(300, b"\0"))
    with pytest.raises(InputError, match="version 2"):
        open_checkpoint(path)
    path.write_bytes(struct.pack("<Ii", 0x616B3432, 1))
    with pytest.raises(InputError, match="truncated"):
        open_checkpoint(path)
    for content in (b"", b"hello", b"\xff" * 1000):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a supported checkpoint; supported are: Hugging Face folder"):
            open_checkpoint(path)
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")


def test_the_built_in_model_opens() -> None:
    checkpoint = open_checkpoint(BUILT_IN)
    assert checkpoint.config.context == 512
    assert checkpoint.config.tied
    assert checkpoint.tokenizer == BUILT_IN / "tokenizer.model"
