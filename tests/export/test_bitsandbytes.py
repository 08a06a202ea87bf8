"""Tests checkpoints of bitsandbytes, by a plain reading of its formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from export.checkpoints.layouts import open_checkpoint
from export.checkpoints.quantised.methods import dequantised
from model.errors import InputError
from tests.support.quantised import Packed, Random, check, sources, write

FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def four_bits(
    kind: str, is_nested: bool, size: int = 64, stored_as: torch.dtype = torch.uint8
) -> Callable[..., Packed]:
    """Returns a function that makes up a matrix of 4-bit numbers, the first of two in the higher bits of a byte."""

    def pack(rng: Random, weight: Tensor) -> Packed:
        count, blocks = weight.numel(), -(-weight.numel() // size)
        table = rng.uniform(-1, 1, 16).astype(np.float32)
        codes = rng.integers(16, size=count)
        packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16"}
        state |= {"shape": list(weight.shape)}
        parts = {".weight": torch.from_numpy(packed).view(stored_as).reshape(-1, 1)}
        parts |= {".weight.quant_map": torch.from_numpy(table)}
        scales = rng.uniform(0.01, 0.1, blocks).astype(np.float32)
        parts[".weight.absmax"] = torch.from_numpy(scales)
        if is_nested:
            nested, inner = rng.uniform(-1, 1, 256).astype(np.float32), rng.integers(256, size=blocks)
            outer = rng.uniform(0.01, 0.1, -(-blocks // 4)).astype(np.float32)
            offset = np.float32(0.3)
            scales = nested[inner] * outer[np.arange(blocks) // 4] + offset
            state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": float(offset)}
            parts[".weight.absmax"] = torch.from_numpy(inner.astype(np.uint8))
            parts |= {".weight.nested_absmax": torch.from_numpy(outer)}
            parts |= {".weight.nested_quant_map": torch.from_numpy(nested)}
        matrix = table[codes] * scales[np.arange(count) // size]
        said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return parts | {f".weight.quant_state.bitsandbytes__{kind}": said}, torch.from_numpy(matrix).view(weight.shape)

    return pack


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_4_bits(kind: str, is_nested: bool, tmp_path: Path) -> None:
    said = {"quantization_config": FOUR_BITS | {"bnb_4bit_quant_type": kind}}
    expected = write(tmp_path, said, four_bits(kind, is_nested))
    check(tmp_path, expected, f"bitsandbytes, 4 bits ({kind})")


def test_a_last_block_may_be_shorter(tmp_path: Path) -> None:
    expected = write(tmp_path, {"quantization_config": FOUR_BITS}, four_bits("nf4", True, size=1000))
    check(tmp_path, expected, "bitsandbytes, 4 bits (nf4)")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_may_be_stored_as_wider_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = write(tmp_path, {"quantization_config": FOUR_BITS}, four_bits("nf4", False, stored_as=dtype))
    check(tmp_path, expected, "bitsandbytes, 4 bits (nf4)")


def eight_bits(rng: Random, weight: Tensor) -> Packed:
    codes = rng.integers(-127, 128, tuple(weight.shape))
    scales = rng.uniform(0.1, 1, len(weight)).astype(np.float32)
    matrix = codes.astype(np.float32) * scales[:, None] * np.float32(1 / 127)
    parts = {".weight": torch.from_numpy(codes).to(torch.int8), ".SCB": torch.from_numpy(scales)}
    return parts | {".weight_format": torch.tensor(0, dtype=torch.uint8)}, torch.from_numpy(matrix)


def test_8_bits(tmp_path: Path) -> None:
    expected = write(tmp_path, {"quantization_config": EIGHT_BITS}, eight_bits)
    check(tmp_path, expected, "bitsandbytes, 8 bits")


STATE = ".weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({STATE: None}, f"it lacks layer{STATE}"),
        ({STATE: torch.tensor(list(b"{}"), dtype=torch.uint8)}, r"settings are damaged \(KeyError\('shape'\)\)"),
        ({STATE: torch.tensor(list(b"{"), dtype=torch.uint8)}, "settings are damaged"),
        ({".weight.quant_map": None}, "it lacks layer.weight.quant_map"),
        ({".weight": torch.zeros(700, 1, dtype=torch.uint8)}, r"layer has 700 packed numbers, .* fit \[32, 48\]"),
        ({".weight.absmax": torch.ones(25)}, r"the scales of layer have the shape \[25\], not \[24\]"),
        ({".weight.nested_absmax": None}, "the scales of layer are incomplete"),
        ({".weight.nested_quant_map": None}, "the scales of layer are incomplete"),
        ({".weight.nested_absmax": torch.ones(5)}, r"the scale_scales of layer have the shape \[5\], not \[6\]"),
    ],
)
def test_4_bits_that_do_not_fit_are_named(changes: dict[str, Tensor | None], message: str) -> None:
    parts, _ = four_bits("nf4", is_nested=True)(np.random.default_rng(0), torch.ones(32, 48))
    stored = {f"layer{end}": part for end, part in {**parts, **changes}.items() if part is not None}
    with pytest.raises(InputError, match=rf"is quantised \(bitsandbytes\), but .*{message}.*; give the"):
        dequantised(Path("model"), {"quantization_config": FOUR_BITS}, sources(stored))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".weight_format": torch.tensor(2, dtype=torch.uint8)}, "in a GPU's order"),
        ({".SCB": torch.ones(5)}, r"the scales of .* have the shape \[5\], not \[32\]"),
        ({".weight": torch.ones(32, 48)}, "has scales, but its weights are not quantised"),
    ],
)
def test_8_bits_that_do_not_fit_are_named(changes: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    def pack(rng: Random, weight: Tensor) -> Packed:
        return eight_bits(rng, weight)[0] | {end: tensor.clone() for end, tensor in changes.items()}, weight

    write(tmp_path, {"quantization_config": EIGHT_BITS}, pack)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)
