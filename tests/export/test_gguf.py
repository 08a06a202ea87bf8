"""GGUF files: weights, settings and damage; the tokenizer in them is tested in test_gguf_tokenizer.py."""

import random
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from export.checkpoints import gguf_file
from export.checkpoints.layouts import open_checkpoint
from export.planning.plan import ExportOptions, plan
from export.weights.formats.blocks import Blocks
from model.config import RopeScaling
from model.errors import InputError
from model.rotary import inverse_frequencies
from tests.conftest import TOY, random_model
from tests.support.checkpoints import write_gguf

WIDE = replace(TOY, dim=64, head_dim=16, hidden_dim=96)
"""Every width a multiple of 32, the block of GGUF's quantised formats."""


@pytest.mark.parametrize(
    ("kind", "worst"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 0.01), ("Q4_0", 0.2)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_files_open_as_what_was_written_up_to_their_storage(
    tmp_path: Path, kind: str, worst: float, tied: bool
) -> None:
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


def test_gguf_integers_are_no_weights(tmp_path: Path) -> None:
    path = write_gguf(random_model(WIDE), tmp_path / "model.gguf", "F32")
    whole = path.read_bytes()
    name = b"output_norm.weight"
    kind = whole.index(name) + len(name) + 4 + 8  # after the count of dimensions and the one dimension
    assert whole[kind : kind + 4] == struct.pack("<I", gguf.GGMLQuantizationType.F32)
    path.write_bytes(whole[:kind] + struct.pack("<I", gguf.GGMLQuantizationType.I32) + whole[kind + 4 :])
    with pytest.raises(InputError, match=r"quantised or integer weights: output_norm\.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_ggufs_own_blocks_are_stored_bit_for_bit(tmp_path: Path, kind: str, tied: bool) -> None:
    path = write_gguf(random_model(replace(WIDE, tied=tied)), tmp_path / "model.gguf", kind)
    planned = plan(ExportOptions(checkpoint=path, quantize="gguf", max_seq_len=32, tokenizer=Path("none")))
    source = planned.source
    for name, weight in open_checkpoint(path).weights.items():
        form = source.format(name)
        if isinstance(form, Blocks):
            found = dequantize(source.stored(name).numpy(), GGMLQuantizationType[form.name])
            assert torch.equal(torch.from_numpy(found.copy()), weight), name
    assert source.scheme.formats == (Blocks.of(kind),) * 3
    other = plan(ExportOptions(checkpoint=path, quantize="q5_0", max_seq_len=32, tokenizer=Path("none"))).source
    assert other.format("layers.0.attention.wq.weight") == Blocks.of("Q5_0"), "rounded anew"


def test_weights_that_are_not_in_blocks_have_no_types_to_keep(tmp_path: Path) -> None:
    path = write_gguf(random_model(WIDE), tmp_path / "model.gguf", "F16")
    with pytest.raises(InputError, match=r"--quantize gguf needs a GGUF whose layers .* but these have float; choose"):
        plan(ExportOptions(checkpoint=path, quantize="gguf", max_seq_len=32, tokenizer=Path("none")))


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
