"""Tests quantised checkpoints: their own library's dequantisation where it runs here, otherwise a plain reading of the
format.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from export.checkpoints.layouts import open_checkpoint
from export.checkpoints.quantised.method import unpacked
from export.checkpoints.quantised.methods import METHODS, dequantised
from export.planning.plan import ExportOptions, plan
from model.errors import InputError
from tests.support.quantised import Packed, Random, check, sources, words, write


@pytest.mark.parametrize("bits", range(2, 9))
def test_numbers_of_any_size_are_unpacked(bits: int) -> None:
    codes = np.random.default_rng(0).integers(1 << bits, size=(3, 50))
    found = unpacked(words(codes, bits), bits, 50)
    assert found.tolist() == codes.tolist()


def gptq(bits: int, size: int, shift: int, is_ordered: bool) -> Callable[[Random, Tensor], Packed]:
    def pack(rng: Random, weight: Tensor) -> Packed:
        outputs, inputs = weight.shape
        groups = -(-inputs // size)
        codes, zeros = (rng.integers(1 << bits, size=(rows, outputs)) for rows in (inputs, groups))
        scales = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)
        order = np.arange(inputs) // size
        if is_ordered:
            rng.shuffle(order)
        matrix = np.empty((outputs, inputs), np.float32)
        for row in range(inputs):
            for column in range(outputs):
                group = order[row]
                matrix[column, row] = np.float32(scales[group, column]) * (codes[row, column] - zeros[group, column])
        parts = {".qweight": words(codes.T, bits).T, ".qzeros": words((zeros - shift) % (1 << bits), bits)}
        parts |= {".scales": torch.from_numpy(scales)}
        parts |= {".g_idx": torch.from_numpy(order).int()} if is_ordered else {}
        return parts, torch.from_numpy(matrix)

    return pack


@pytest.mark.parametrize(
    ("settings", "size", "shift", "is_ordered", "note"),
    [
        ({"bits": 4, "group_size": 16, "desc_act": True}, 16, 1, True, "4 bits in groups of 16"),
        ({"bits": 8, "group_size": 16, "checkpoint_format": "gptq_v2"}, 16, 0, False, "8 bits in groups of 16"),
        ({"bits": 4, "group_size": -1, "checkpoint_format": "gptq"}, 48, 1, False, "4 bits"),
        ({"bits": 3, "group_size": 32}, 32, 1, True, "3 bits in groups of 32"),
    ],
)
def test_gptq(settings: dict[str, Any], size: int, shift: int, is_ordered: bool, note: str, tmp_path: Path) -> None:
    said = {"quantization_config": {"quant_method": "gptq"} | settings}
    expected = write(tmp_path, said, gptq(settings["bits"], size, shift, is_ordered))
    check(tmp_path, expected, f"GPTQ, {note}")


def awq(rng: Random, weight: Tensor) -> Packed:
    outputs, inputs = weight.shape
    codes, zeros = (rng.integers(16, size=(rows, outputs)) for rows in (inputs, inputs // 16))
    scales = rng.uniform(0.01, 0.1, (inputs // 16, outputs)).astype(np.float16)

    def packed(numbers: np.ndarray) -> Tensor:
        ordered = numbers.reshape(len(numbers), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(numbers.shape)
        return words(ordered, 4)

    matrix = (codes - zeros.repeat(16, 0)) * scales.repeat(16, 0).astype(np.float32)
    parts = {".qweight": packed(codes), ".qzeros": packed(zeros), ".scales": torch.from_numpy(scales)}
    return parts, torch.from_numpy(matrix.T.astype(np.float32))


def test_awq(tmp_path: Path) -> None:
    said = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    check(tmp_path, write(tmp_path, {"quantization_config": said}, awq), "AWQ, 4 bits in groups of 16")


def float8(ending: str, block: tuple[int, int]) -> Callable[[Random, Tensor], Packed]:
    def pack(rng: Random, weight: Tensor) -> Packed:
        codes = (weight * 50).to(torch.float8_e4m3fn)
        shape = [-(-size // part) for size, part in zip(weight.shape, block, strict=True)]
        scales = torch.from_numpy(rng.uniform(0.01, 0.1, shape).astype(np.float32))
        matrix = codes.float()
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                matrix[row, column] *= scales[row // block[0], column // block[1]]
        return {".weight": codes, ending: scales, ".input_scale": torch.ones(1)}, matrix

    return pack


def test_float8_in_blocks(tmp_path: Path) -> None:
    said = {"quant_method": "fp8", "weight_block_size": [20, 24], "activation_scheme": "dynamic"}
    expected = write(tmp_path, {"quantization_config": said}, float8(".weight_scale_inv", (20, 24)))
    check(tmp_path, expected, "8-bit floats in blocks of 20 by 24")


def test_mxfp4() -> None:
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(256, size=(3, 6, 2, 16), dtype=np.uint8))
    scales = torch.from_numpy(rng.integers(100, 150, size=(3, 6, 2), dtype=np.uint8))
    stored = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    found, notes = dequantised(Path("model"), config, sources(stored))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert notes == ("weights are dequantised from MXFP4",)
    assert found["experts.down_proj"].shape == expected.shape
    assert torch.equal(found["experts.down_proj"].read(()), expected)
    part = (slice(1, 2), slice(3, 40))
    assert torch.equal(found["experts.down_proj"].read(part), expected[part])


def mlx(bits: int) -> Callable[[Random, Tensor], Packed]:
    def pack(rng: Random, weight: Tensor) -> Packed:
        rows, columns = weight.shape
        codes = rng.integers(1 << bits, size=(rows, columns))
        scales, offsets = (rng.uniform(-0.1, 0.1, (rows, columns // 16)).astype(np.float16) for _ in range(2))
        matrix = codes * scales.repeat(16, 1).astype(np.float32) + offsets.repeat(16, 1).astype(np.float32)
        parts = {".weight": words(codes, bits).view(torch.uint32)}
        parts |= {".scales": torch.from_numpy(scales), ".biases": torch.from_numpy(offsets)}
        return parts, torch.from_numpy(matrix.astype(np.float32))

    return pack


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_mlx(bits: int, tmp_path: Path) -> None:
    expected = write(tmp_path, {"quantization": {"bits": bits, "group_size": 16}}, mlx(bits))
    check(tmp_path, expected, f"MLX, {bits} bits in groups of 16")


def test_a_module_of_mlx_may_have_settings_of_its_own(tmp_path: Path) -> None:
    own = {f"model.layers.{layer}.mlp.down_proj": {"bits": 8, "group_size": 16} for layer in range(3)}

    def pack(rng: Random, weight: Tensor) -> Packed:
        return mlx(8 if tuple(weight.shape) == (32, 48) else 4)(rng, weight)

    expected = write(tmp_path, {"quantization": {"bits": 4, "group_size": 16} | own}, pack)
    check(tmp_path, expected, "MLX, 4 bits in groups of 16")


def test_an_export_quantises_the_dequantised_weights_anew(tmp_path: Path) -> None:
    said = {"quant_method": "awq", "bits": 4, "group_size": 16}
    write(tmp_path, {"quantization_config": said}, awq)
    options = ExportOptions(checkpoint=tmp_path, tokenizer=Path("none"), quantize="8da8w", output=tmp_path / "a.pte")
    planned = plan(options)
    assert planned.summary.endswith("; weights are dequantised from AWQ, 4 bits in groups of 16")
    plain = plan(ExportOptions(tmp_path / "plain", tokenizer=Path("none"), quantize="8da8w", output=tmp_path / "b.pte"))
    name = "layers.0.attention.wq.weight"
    for found, expected in zip(planned.source.parts(name), plain.source.parts(name), strict=True):
        assert torch.equal(found[1], expected[1])


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, r"\(aqlm\), but only awq, .* can be read"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"\(hqq\), but only awq, .* can be read"),
        ({"quantization_config": {"quant_method": "torchao"}}, r"\(torchao\), but only awq, .* can be read"),
        ({"quantization_config": {"bits": 4}}, r"\(by an unnamed method\), but only"),
        ({"quantization_config": 4}, r"\(by an unnamed method\), but only"),
        ({"quantization_config": GPTQ | {"checkpoint_format": "marlin"}}, "its format 'marlin' is unsupported"),
        ({"quantization_config": GPTQ | {"bits": 5}}, "5 bits are unsupported"),
        ({"quantization_config": GPTQ | {"dynamic": {r"+:.*\.18\..*": {"bits": 8}}}}, "settings of their own"),
        ({"quantization_config": GPTQ | {"group_size": 8}}, "has 3 groups, not 6"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"settings are damaged \(KeyError\('bits'\)\)"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "version 'gemv' is unsupported"),
        ({"quantization_config": {"quant_method": "awq"}}, r"the zeros of .* have the shape \[3, 4\]"),
        ({"quantization_config": {"quant_method": "fp8"}}, "no tensors whose names end in .weight_scale_inv"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "no tensors whose names end in .SCB, .weight.abs"),
        ({"quantization": {"bits": 4, "group_size": 16}}, r"\(mlx\), but it lacks .*biases"),
        ({"quantization": {"mode": "nvfp4"}}, r"\(mlx\), but its mode 'nvfp4' is unsupported"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_method(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, settings, gptq(4, 16, 1, False))
    with pytest.raises(InputError, match=f"is quantised .*{message}.*; give the unquantised checkpoint") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_method_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/exporting.md").read_text()
    assert all(f"| `{name}` |" in text for name in METHODS)
