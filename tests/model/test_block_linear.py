import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor, nn

from model import block_linear
from model.block_linear import BLOCK_FORMS, relaid, rounded
from runtime.engine.executorch import _C  # importing it loads the operators
from tests.support.blocks import MICROSCALING, numbers, sizes

HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}
"""Byte offsets of the float16 numbers in blocks that the gguf package has, but cannot make."""

OPERATOR = (Path(__file__).parents[2] / "cpp_runner" / "src" / "linear" / "operator.cpp").read_text()


def test_the_devices_operators_have_the_same_schemas() -> None:
    comment = " ".join(re.findall(r"^// ?(.*)", OPERATOR.partition("#include")[0], re.MULTILINE))
    described = re.findall(r"(\w+)(\(Tensor .*? -> Tensor\(a!\))", re.sub(r"\s+", " ", comment))
    assert [name for name, _ in described] == ["linear", "expert_linear", "block_rows"]
    for name, arguments in described:
        assert f"llama_pte::{name}.out{arguments}" == str(getattr(torch.ops.llama_pte, name).out._schema)
        assert f'"llama_pte::{name}.out"' in OPERATOR
    *places, count = _enumerated("ExpertArgument", "kExpert")
    schema = torch.ops.llama_pte.expert_linear.out._schema
    assert (places, count) == ([argument.name for argument in schema.arguments], "arguments")
    *matrix, count = _enumerated("Argument", "k")
    assert count == "arguments"
    (names,) = re.findall(r"kNames\[\] = \{(.*?)\}", OPERATOR, re.DOTALL)
    for number, name in enumerate(re.findall(r'"llama_pte::(\w+)\.out"', names), 1):
        suffixes = ("", "2", "3")[:number]
        expected = ["x", *(each + suffix for suffix in suffixes for each in matrix), *(f"out{i}" for i in suffixes)]
        assert [each.name for each in getattr(torch.ops.llama_pte, name).out._schema.arguments] == expected


def _enumerated(name: str, prefix: str) -> list[str]:
    """Returns the members of an enumeration in the operators' source, in lower case and without a prefix."""
    (members,) = re.findall(rf"enum {name} : size_t \{{(.*?)\}}", OPERATOR, re.DOTALL)
    return [found.lower() for found in re.findall(rf"{prefix}(\w+)", members)]


def blocks_of(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a matrix in blocks: random numbers rounded by gguf or, where gguf cannot, random bytes."""
    N, K = shape
    random = np.random.default_rng(N)
    columns, size = sizes(kind)
    if kind not in HALVES and kind not in MICROSCALING:
        return quantize(random.standard_normal((N, K)).astype(np.float32), GGMLQuantizationType[kind])
    blocks = random.integers(0, 256, (N, K // columns, size), dtype=np.uint8)
    if kind in MICROSCALING:
        blocks[..., 0] = random.integers(110, 130, blocks.shape[:-1])
    for at in HALVES.get(kind, ()):
        scales = (random.standard_normal((N, K // columns, 1)) / 64).astype(np.float16)
        blocks[..., at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(N, -1)


def matrix(kind: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Returns a random matrix as stored in the runtime's groups, and its dequantised values."""
    blocks = torch.from_numpy(blocks_of(kind, shape))
    return relaid(blocks, kind).flatten(), numbers(blocks, kind)


@pytest.mark.parametrize("kind", BLOCK_FORMS)
def test_groups_hold_ggufs_numbers_in_as_many_bytes(kind: str) -> None:
    weight, expected = matrix(kind, 37, 512)
    assert weight.numel() == 48 * 512 // BLOCK_FORMS[kind].columns * sizes(kind)[1]
    for tokens in (torch.arange(37), torch.tensor([[36, 0], [5, 36]])):
        assert torch.equal(torch.ops.llama_pte.block_rows(weight, tokens, kind, 512), expected[tokens])


@pytest.mark.parametrize("kind", BLOCK_FORMS)
def test_blocks_stand_for_ggufs_numbers(kind: str) -> None:
    blocks = torch.from_numpy(blocks_of(kind, (37, 512)))
    assert torch.equal(block_linear.numbers(blocks, kind), numbers(blocks, kind))


@pytest.mark.parametrize("kind", BLOCK_FORMS)
def test_the_operator_only_rounds_its_inputs(kind: str) -> None:
    torch.manual_seed(0)
    weight, matrix_numbers = matrix(kind, 37, 512)
    x, bias = torch.randn(2, 5, 512), torch.randn(37)
    x[0, 0, :32] = 0
    codes, scale = rounded(x.flatten(0, 1))
    near = (codes * scale.unsqueeze(-1)).view(2, 5, 512)
    assert bool(((near - x).abs() <= scale.repeat_interleave(32, -1).view(2, 5, 512) * 0.5001).all())
    y = torch.ops.llama_pte.linear(x, weight, bias, kind, 37)
    exact = (near.double() @ matrix_numbers.double().T + bias).float()
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    plain = torch.ops.llama_pte.linear(x, weight, None, kind, 37)
    assert torch.equal(plain + bias, y)


class BlockLinears(nn.Module):
    """Calls the operator for one or more matrices [37, 512]."""

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = kinds
        for i, kind in enumerate(kinds):
            self.register_buffer(f"weight{i}", matrix(kind, 37, 512)[0])
            self.register_buffer(f"bias{i}", torch.randn(37))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        given = [
            [getattr(self, f"weight{i}"), getattr(self, f"bias{i}"), kind, 37] for i, kind in enumerate(self.kinds)
        ]
        operator = getattr(torch.ops.llama_pte, f"linear{len(given) if len(given) > 1 else ''}")
        made: Any = operator(x, *(argument for arguments in given for argument in arguments))
        return made if len(given) > 1 else (made,)


@pytest.mark.parametrize("kinds", [*((kind,) for kind in BLOCK_FORMS), ("Q8_0", "Q4_K"), ("Q4_1", "Q6_K", "Q4_0")])
def test_the_kernel_computes_the_same_bits(kinds: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = BlockLinears(kinds)
    length = torch.export.Dim("length", min=1, max=100)
    program = torch.export.export(module, (torch.randn(2, 40, 512),), dynamic_shapes=({1: length},))
    path = tmp_path / "linear.pte"
    edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    path.write_bytes(edge.to_executorch().buffer)
    loaded = _C._load_for_executorch(str(path))
    for L in (1, 7, 100):
        x = torch.randn(2, L, 512) * torch.logspace(-3, 3, 512)
        found = loaded.run_method("forward", (x,))
        assert all(torch.equal(y, expected) for y, expected in zip(found, module(x), strict=True)), L


def test_a_row_does_not_depend_on_the_others() -> None:
    weight, _ = matrix("Q4_0", 20, 64)
    x = torch.randn(9, 64)
    together = torch.ops.llama_pte.linear(x, weight, None, "Q4_0", 20)
    for row, y in zip(x, together, strict=True):
        assert torch.equal(torch.ops.llama_pte.linear(row, weight, None, "Q4_0", 20), y)


class ExpertLinear(nn.Module):
    """Calls the operator twice: with the same row for all experts of a token, and with a row for each."""

    def __init__(self, weights: list[Tensor], rows: int, kind: str) -> None:
        super().__init__()
        for number, weight in enumerate(weights):
            self.register_buffer(f"weight_{number}", weight)
        self.count = len(weights)
        self.rows = rows
        self.kind = kind

    def forward(self, x: Tensor, own: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        weights = [self.get_buffer(f"weight_{number}") for number in range(self.count)]
        operator = torch.ops.llama_pte.expert_linear
        return tuple(operator(each, weights, chosen, self.kind, self.rows) for each in (x, own))


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_experts_multiply_as_linear_layers_do(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = matrix(kind, 5 * 48, 512)[0].chunk(5)
    module = ExpertLinear(weights, 37, kind)
    length = {1: torch.export.Dim("length", min=1, max=200)}
    given = (torch.randn(2, 40, 512), torch.randn(2, 40, 3, 512), torch.randint(5, (2, 40, 3)))
    program = torch.export.export(module, given, dynamic_shapes=(length, length, length))
    path = tmp_path / "experts.pte"
    edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    path.write_bytes(edge.to_executorch().buffer)
    loaded = _C._load_for_executorch(str(path))
    for L, experts in ((1, 5), (7, 5), (200, 5), (200, 1)):  # 200 tokens of one expert are more than it takes at once
        x, own = torch.randn(2, L, 512), torch.randn(2, L, 3, 512)
        chosen = torch.rand(2, L, 3, 5)[..., :experts].argmax(-1)
        found = loaded.run_method("forward", (x, own, chosen))
        each = [[torch.ops.llama_pte.linear(y, w, None, kind, 37) for w in weights] for y in (x.unsqueeze(2), own)]
        for y, products in zip(found, each, strict=True):
            places = chosen.unsqueeze(-1)
            wanted = torch.zeros(2, L, 3, 37)
            for number, product in enumerate(products):
                wanted = torch.where(places == number, product, wanted)
            assert torch.equal(y, wanted), (L, experts)
        assert all(map(torch.equal, module(x, own, chosen), found))


def test_an_unknown_expert_is_refused(tmp_path: Path) -> None:
    weights = matrix("Q4_0", 3 * 16, 64)[0].chunk(3)
    module = ExpertLinear(weights, 16, "Q4_0")
    x, own = torch.randn(1, 2, 64), torch.randn(1, 2, 2, 64)
    program = torch.export.export(module, (x, own, torch.zeros(1, 2, 2, dtype=torch.long)))
    path = tmp_path / "experts.pte"
    edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    path.write_bytes(edge.to_executorch().buffer)
    loaded = _C._load_for_executorch(str(path))
    for wrong in (-1, 3, 1 << 40):
        with pytest.raises(RuntimeError):
            loaded.run_method("forward", (x, own, torch.tensor([[[0, 1], [2, wrong]]])))
