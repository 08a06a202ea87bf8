"""Tests GGUF files: weights, settings and damage. Their tokenizers are tested in test_gguf_tokenizer.py."""

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from export import inspect
from export.checkpoints import gguf_file
from export.checkpoints.layouts import open_checkpoint
from export.llama import export_llama
from export.planning.memory import memory_use
from export.planning.plan import ExportOptions, plan
from export.planning.sharding import Sharding
from export.weights.formats.blocks import Blocks
from export.weights.formats.float32 import FLOAT
from export.weights.scheme import Scheme
from export.weights.source import WeightSource
from model.config import RopeScaling
from model.errors import InputError
from model.rotary import inverse_frequencies
from runtime.engine.program import read_metadata
from tests.conftest import TOY, random_model
from tests.support.checkpoints import write_gguf

WIDE = replace(TOY, dim=64, head_dim=16, hidden_dim=96)
"""A model whose widths are multiples of 32, the block size of GGUF's quantised types."""


@pytest.mark.parametrize(
    ("kind", "worst"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 0.01), ("Q4_0", 0.2)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_files_survive_a_round_trip_up_to_rounding(tmp_path: Path, kind: str, worst: float, tied: bool) -> None:
    model = random_model(replace(WIDE, tied=tied))
    checkpoint = open_checkpoint(write_gguf(model, tmp_path / "model.gguf", kind))
    assert checkpoint.config == replace(model.config, norm_eps=checkpoint.config.norm_eps)
    assert checkpoint.config.norm_eps == pytest.approx(model.config.norm_eps)
    assert (checkpoint.bos_id, checkpoint.stop_ids) == (1, (2,))
    built = checkpoint.build().state_dict()
    for name, expected in model.state_dict().items():
        assert (built[name] - expected).abs().max() <= worst * expected.abs().max(), name


def test_a_gguf_files_rotary_divisors_are_read_as_llama_31s_scaling(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 32.0, 8192)
    config = replace(WIDE, rope_theta=500000.0)
    plain = inverse_frequencies(config, config.context)
    factors = plain / inverse_frequencies(replace(config, rope_scaling=scaling), config.context)
    path = write_gguf(random_model(config), tmp_path / "model.gguf", "F32", factors)
    assert open_checkpoint(path).config.rope_scaling == scaling
    path = write_gguf(random_model(config), tmp_path / "other.gguf", "F32", factors * torch.linspace(1, 2, 8))
    with pytest.raises(InputError, match=r"rotary frequency factors other than Llama 3\.1's"):
        open_checkpoint(path)


def test_all_parts_of_a_split_gguf_are_read(tmp_path: Path) -> None:
    model = random_model(WIDE)
    write_gguf(model, tmp_path / "model.gguf", "Q8_0", most_tensors=9)
    whole = open_checkpoint(write_gguf(model, tmp_path / "whole.gguf", "Q8_0"))
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert [part.name for part in parts] == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for given in parts:
        checkpoint = open_checkpoint(given)
        assert checkpoint.files == tuple(parts)
        assert (checkpoint.config, checkpoint.stop_ids) == (whole.config, whole.stop_ids)
        assert (checkpoint.weights.keys(), checkpoint.blocks.keys()) == (whole.weights.keys(), whole.blocks.keys())
        assert all(torch.equal(weight, whole.weights[name]) for name, weight in checkpoint.weights.items())
    last = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(InputError, match=r"model-00003-of-00003\.gguf is not part 3 of 3, as its name says"):
        open_checkpoint(parts[0])
    parts[2].write_bytes(last[:-1])
    with pytest.raises(InputError, match=r"model-00003-of-00003\.gguf is truncated"):
        open_checkpoint(parts[0])
    parts[2].unlink()
    with pytest.raises(InputError, match=r"lacks model-00003-of-00003\.gguf, of 3 parts; download all parts"):
        open_checkpoint(parts[1])
    with pytest.raises(InputError, match="is one of 3 parts, but not named as such; rename all parts to NAME-00001-of"):
        open_checkpoint(parts[0].rename(tmp_path / "first.gguf"))


def test_a_cut_gguf_file_and_another_architecture_are_refused(tmp_path: Path) -> None:
    path = write_gguf(random_model(WIDE), tmp_path / "model.gguf", "F16")
    whole = path.read_bytes()
    for size in (4, 20, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="is truncated or not a GGUF file"):
            open_checkpoint(path)
    path.write_bytes(whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"))
    with pytest.raises(InputError, match="architecture 'mamba'"):
        open_checkpoint(path)


def test_a_damaged_gguf_file_is_refused_or_opens_but_never_crashes(tmp_path: Path) -> None:
    path = write_gguf(random_model(replace(WIDE, vocab_size=64)), tmp_path / "model.gguf", "Q8_0")
    whole, generator = path.read_bytes(), random.Random(0)
    refused = list[str]()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(1500)] = generator.choice((0, 1, 8, 9, 127, 255, generator.randrange(256)))
        path.write_bytes(damaged)
        try:
            opened = open_checkpoint(path)
            assert len(dict(opened.weights)) == len(opened.weights)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert not any("\n" in message for message in refused)


def test_gguf_integers_are_refused_as_weights(tmp_path: Path) -> None:
    path = write_gguf(random_model(WIDE), tmp_path / "model.gguf", "F32")
    whole = path.read_bytes()
    name = b"output_norm.weight"
    kind = whole.index(name) + len(name) + 4 + 8  # behind the number of dimensions and the one dimension
    assert whole[kind : kind + 4] == struct.pack("<I", gguf.GGMLQuantizationType.F32)
    path.write_bytes(whole[:kind] + struct.pack("<I", gguf.GGMLQuantizationType.I32) + whole[kind + 4 :])
    with pytest.raises(InputError, match=r"quantised or integer weights: output_norm\.weight"):
        open_checkpoint(path)


MIXED = replace(TOY, dim=256, head_dim=64, hidden_dim=512, n_layers=3, vocab_size=64)


def kind_of(name: str) -> str:
    """A type for each matrix, of nearly every sort."""
    types = {"tok_embeddings": "Q6_K", "output": "Q5_K", "wq": "Q4_K", "wk": "Q4_0", "wo": "F16", "w3": "Q4_1"}
    role = name.split(".")[-2]
    if role == "wv":
        return "Q6_K" if name.startswith("layers.1.") else "Q4_K"
    return types.get(role, "Q8_0")


def stored_as_in(path: Path, **changes: Any) -> WeightSource:
    """The weights of a plan for a GGUF file."""
    return plan(ExportOptions(checkpoint=path, max_seq_len=32, tokenizer=Path("none"), **changes)).source


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", kind_of])
def test_a_ggufs_own_blocks_are_stored_bit_for_bit(
    tmp_path: Path, kind: str | Callable[[str], str], tied: bool
) -> None:
    config = replace(MIXED if callable(kind) else WIDE, tied=tied)
    path = write_gguf(random_model(config), tmp_path / "model.gguf", kind)
    checkpoint, source = open_checkpoint(path), stored_as_in(path)
    for name, weight in checkpoint.weights.items():
        if weight.dim() == 1:
            continue
        form, wanted = source.format(name), kind(name) if callable(kind) else kind
        if wanted == "F16":
            assert form == FLOAT
            assert torch.equal(source.stored(name), weight)
        else:
            assert form == Blocks.of(wanted)
            found = dequantize(source.stored(name).numpy(), GGMLQuantizationType[wanted])
            assert torch.equal(torch.from_numpy(found.copy()), weight), name
    assert source.format("head.output.weight") == source.format("tok_embeddings.weight") or not tied
    assert stored_as_in(path, quantize="gguf").scheme == source.scheme
    assert stored_as_in(path, quantize="q5_0").format("layers.0.attention.wq.weight") == Blocks.of("Q5_0")
    assert stored_as_in(path, backend="portable").scheme == stored_as_in(path, quantize="fp32").scheme


def test_types_that_are_not_kept_are_said(tmp_path: Path) -> None:
    path = write_gguf(random_model(MIXED), tmp_path / "model.gguf", kind_of)
    options = ExportOptions(checkpoint=path, max_seq_len=32, tokenizer=Path("none"))
    (warning,) = plan(options).warnings
    assert "no operator runs the types of some matrices (3 in F16), which become float32; give --quantize" in warning
    assert plan(replace(options, quantize="fp32")).warnings == ()


def test_a_gguf_in_floats_is_float32_by_default(tmp_path: Path) -> None:
    path = write_gguf(random_model(WIDE), tmp_path / "model.gguf", "F16")
    assert stored_as_in(path).scheme == Scheme()
    with pytest.raises(
        InputError, match=r"--quantize gguf needs .* but the checkpoint has F16 and F32; choose from fp32"
    ):
        stored_as_in(path, quantize="gguf")


@pytest.mark.parametrize(
    "sharding",
    [
        Sharding(),
        pytest.param(Sharding(shards=2), marks=pytest.mark.slow),
        pytest.param(Sharding(slices=2), marks=pytest.mark.slow),
    ],
    ids=["whole", "shards", "slices"],
)
def test_a_gguf_of_several_types_is_exported(
    tmp_path: Path, sharding: Sharding, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exporting verifies the logits and the stored bytes."""
    path = write_gguf(random_model(MIXED), tmp_path / "model.gguf", kind_of)
    options = ExportOptions(path, Path("none"), tmp_path / "out", max_seq_len=32, prefill_chunk=7, sharding=sharding)
    metadata = read_metadata(export_llama(options))
    assert metadata.provenance["verified"]
    assert metadata.provenance["options"]["quantize"] == "gguf"
    assert Scheme.of(metadata) == plan(options).source.scheme
    assert memory_use(metadata).weights == pytest.approx(3 * 256 * 256 * 4, rel=0.01), "only wo is not in blocks"
    assert inspect.main([str(options.output)]) == 0
    text = capsys.readouterr().out
    assert "weights      gguf: linear Q8_0, head Q6_K, embedding Q6_K; KV cache float32\n" in text
    for line in (
        "attention.wk: Q4_0",
        "attention.wo: float32",
        "attention.wq: Q4_K",
        "attention.wv of blocks 0, 2: Q4_K",
        "attention.wv of blocks 1: Q6_K",
        "feed_forward.w3: Q4_1",
    ):
        assert f"\n             {line}\n" in text


def test_the_experts_of_a_mixture_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(replace(WIDE, n_experts=3, n_chosen_experts=2))
    path = write_gguf(model, tmp_path / "model.gguf", "Q8_0")
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == replace(model.config, norm_eps=checkpoint.config.norm_eps)
    sizes, whole = list[int](), dequantize
    monkeypatch.setattr(gguf_file, "dequantize", lambda data, kind: sizes.append(data.size) or whole(data, kind))
    state = model.state_dict()
    for name, weight in checkpoint.weights.items():
        assert (weight - state[name]).abs().max() <= 0.01 * state[name].abs().max(), name
    assert max(sizes) == model.tok_embeddings.weight.numel() // 32 * 34
    assert sizes.count(96 * 64 // 32 * 34) == 2 * 3 * 3, "the matrices of 2 layers, 3 experts and 3 roles"
    source = plan(ExportOptions(checkpoint=path, quantize="gguf", max_seq_len=32, tokenizer=Path("none"))).source
    for number in range(3):
        name = f"layers.1.feed_forward.experts.{number}.w2.weight"
        found = dequantize(source.stored(name).numpy(), GGMLQuantizationType.Q8_0)
        assert torch.equal(torch.from_numpy(found.copy()), checkpoint.weights[name])
