"""Tests checkpoints of compressed-tensors, by a plain reading of its formats."""

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
from tests.support.quantised import Packed, Random, check, sources, words, write

AREAS = {"tensor": (1000, 1000), "channel": (1, 1000), "group": (1, 16), "block": (20, 24)}
"""Rows and columns that share a scale, at most, by the strategy."""


def packer(
    weights: dict[str, Any], is_packed: bool, are_zeros_packed: bool = True, is_ordered: bool = False
) -> Callable[[Random, Tensor], Packed]:
    """Returns a function that makes up a quantised matrix.

    Args:
        weights: the configuration's settings of weights.
        is_packed: whether the matrix consists of 32-bit words.
        are_zeros_packed: whether its zero points do so, too, as they did not in early versions.
        is_ordered: whether the inputs are distributed to the groups at random.
    """
    bits, half = weights["num_bits"], 1 << weights["num_bits"] - 1

    def pack(rng: Random, weight: Tensor) -> Packed:
        rows, columns = weight.shape
        tall, wide = AREAS[weights["strategy"]]
        row, column = np.arange(rows) // tall, np.arange(columns) // wide
        shape = (row[-1] + 1, column[-1] + 1)
        if is_ordered:
            rng.shuffle(column)
        scales = rng.uniform(0.01, 0.1, shape).astype(np.float32)
        zeros = rng.integers(-half, half, shape) * (not weights.get("symmetric", True))
        if weights.get("type") == "float":
            stored = (weight * 50).to(torch.float8_e4m3fn)
            codes = stored.float().numpy()
        else:
            codes = rng.integers(-half, half, (rows, columns))
            stored = torch.from_numpy(codes).to(torch.int8)
        matrix = (codes - zeros[np.ix_(row, column)]) * scales[np.ix_(row, column)]
        parts = {".weight": stored, ".weight_scale": torch.from_numpy(scales), ".input_scale": torch.ones(1)}
        if weights["strategy"] == "tensor":
            parts[".weight_scale"] = parts[".weight_scale"].reshape(1)
        if is_packed:
            parts |= {".weight_packed": words(codes + half, bits), ".weight_shape": torch.tensor(weight.shape)}
            del parts[".weight"]
        if not weights.get("symmetric", True):
            packed = words((zeros + half).T, bits).T
            parts[".weight_zero_point"] = packed if are_zeros_packed else torch.from_numpy(zeros).to(torch.int8)
        if is_ordered:
            parts[".weight_g_idx"] = torch.from_numpy(column).int()
        return parts, torch.from_numpy(matrix.astype(np.float32))

    return pack


def settings(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    said = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quantization_config": said | {"config_groups": groups, "ignore": ["lm_head"]}}


GROUPS = {"strategy": "group", "group_size": 16}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_packed_in_groups(bits: int, is_symmetric: bool, tmp_path: Path) -> None:
    weights = {"num_bits": bits, "symmetric": is_symmetric, **GROUPS}
    expected = write(tmp_path, settings("pack-quantized", weights), packer(weights, is_packed=True))
    check(tmp_path, expected, f"compressed-tensors, {bits} bits in groups of 16 (int)")


@pytest.mark.parametrize("are_zeros_packed", [True, False])
def test_packed_with_an_order_of_groups(are_zeros_packed: bool, tmp_path: Path) -> None:
    weights = {"num_bits": 4, "symmetric": False, "actorder": "group", **GROUPS}
    pack = packer(weights, True, are_zeros_packed, is_ordered=True)
    expected = write(tmp_path, settings("pack-quantized", weights), pack)
    check(tmp_path, expected, "compressed-tensors, 4 bits in groups of 16 (int)")


def test_an_order_of_minus_one_is_the_order_of_the_inputs(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "actorder": "group", **GROUPS}

    def pack(rng: Random, weight: Tensor) -> Packed:
        parts, matrix = packer(weights, is_packed=True)(rng, weight)
        return parts | {".weight_g_idx": torch.full((weight.shape[1],), -1, dtype=torch.int32)}, matrix

    expected = write(tmp_path, settings("pack-quantized", weights), pack)
    check(tmp_path, expected, "compressed-tensors, 4 bits in groups of 16 (int)")


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_packed_by_rows_or_as_a_whole(strategy: str, tmp_path: Path) -> None:
    weights = {"num_bits": 8, "strategy": strategy}
    expected = write(tmp_path, settings("pack-quantized", weights), packer(weights, is_packed=True))
    check(tmp_path, expected, "compressed-tensors, 8 bits (int)")


@pytest.mark.parametrize(
    ("form", "weights", "is_ordered"),
    [
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}, False),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, False),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, False),
        ("naive-quantized", {"num_bits": 8, "symmetric": False, "actorder": "group", **GROUPS}, True),
        ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, False),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, False),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, False),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [20, 24]}, False),
    ],
)
def test_8_bit_numbers(form: str, weights: dict[str, Any], is_ordered: bool, tmp_path: Path) -> None:
    pack = packer(weights, is_packed=False, are_zeros_packed=False, is_ordered=is_ordered)
    expected = write(tmp_path, settings(form, weights), pack)
    groups = " in groups of 16" if weights["strategy"] == "group" else ""
    check(tmp_path, expected, f"compressed-tensors, 8 bits{groups} ({weights.get('type', 'int')})")


def test_modules_may_have_different_formats(tmp_path: Path) -> None:
    packed = {"num_bits": 4, **GROUPS}
    plain = {"num_bits": 8, "type": "float", "strategy": "channel"}
    said = settings("mixed-precision", packed)
    said["quantization_config"]["config_groups"]["group_0"]["format"] = "pack-quantized"
    said["quantization_config"]["config_groups"]["group_1"] = {"weights": plain, "format": "float-quantized"}

    def pack(rng: Random, weight: Tensor) -> Packed:
        is_square = weight.shape[0] == weight.shape[1]
        return packer(packed if is_square else plain, is_square)(rng, weight)

    expected = write(tmp_path, said, pack)
    check(tmp_path, expected, "compressed-tensors, 4 bits in groups of 16 (int) and 8 bits (float)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "its format 'nvfp4-pack-quantized' is unsupported"),
        ({"format": "marlin-24"}, "its format 'marlin-24' is unsupported"),
        ({"format": "dense"}, "its format 'dense' is unsupported"),
        ({"config_groups": {"a": {"format": "mxfp4-pack-quantized"}}}, "its format 'mxfp4-pack-quantized'"),
        ({"quantization_status": "frozen"}, "its status is 'frozen' and not 'compressed'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity and transforms of activations"),
        ({"transform_config": {"config_groups": {}, "R1": {}}}, "sparsity and transforms of activations"),
        ({"config_groups": {"a": {"weights": {"num_bits": 8}}}}, r"has 6 words for 48 inputs, .* num_bits \[8\]"),
        ({"config_groups": None}, "its settings are damaged"),
    ],
)
def test_what_is_not_read_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    weights = {"num_bits": 4, **GROUPS}
    said = settings("pack-quantized", weights)
    said["quantization_config"] |= changes
    write(tmp_path, said, packer(weights, is_packed=True))
    with pytest.raises(
        InputError, match=rf"is quantised \(compressed-tensors\), but .*{message}.*; give the"
    ) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        (".weight_scale", torch.ones(32, 5), r"the scales of layer have the shape \[32, 5\], which does not fit"),
        (".weight_shape", torch.tensor([33, 48]), r"the codes of layer have the shape \[32, 6\], not \[33, 6\]"),
        (".weight_zero_point", torch.ones(32, 1), r"the zeros of layer have the shape \[32, 1\], not \[32, 3\]"),
        (".weight_g_idx", torch.ones(32), r"the groups of layer have the shape \[32\], not \[48\]"),
    ],
)
def test_parts_that_do_not_fit_are_named(part: str, tensor: Tensor, message: str, tmp_path: Path) -> None:
    weights = {"num_bits": 4, **GROUPS}
    parts, _ = packer(weights, is_packed=True)(np.random.default_rng(0), torch.ones(32, 48))
    stored = {f"layer{end}": each for end, each in (parts | {part: tensor}).items()}
    with pytest.raises(InputError, match=message):
        dequantised(tmp_path, settings("pack-quantized", weights), sources(stored))


def test_unquantised_weights_beside_scales_are_named(tmp_path: Path) -> None:
    weights = {"num_bits": 8, "strategy": "channel"}

    def pack(rng: Random, weight: Tensor) -> Packed:
        return {".weight": weight, ".weight_scale": torch.ones(len(weight), 1)}, weight

    write(tmp_path, settings("int-quantized", weights), pack)
    with pytest.raises(InputError, match="has scales, but its weights are not quantised"):
        open_checkpoint(tmp_path)
