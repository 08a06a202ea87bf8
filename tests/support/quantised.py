"""Random checkpoints with quantised matrices, and what should be read from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoints.checkpoint import TensorSource
from export.checkpoints.layouts import open_checkpoint
from tests.support.families import CASES, hugging_face_model

Random = np.random.Generator
Packed = tuple[dict[str, Tensor], Tensor]
"""The tensors of a quantised matrix, by what follows the module's name, and the matrix, [out, in]."""


def write(folder: Path, settings: dict[str, Any], pack: Callable[[Random, Tensor], Packed]) -> dict[str, Tensor]:
    """Writes a random model with quantised linear layers, and returns the weights that should be read."""
    hugging_face_model(CASES["Llama 2"]).save_pretrained(folder)
    rng, state = np.random.default_rng(0), load_file(folder / "model.safetensors")
    expected = dict(state)
    for name in [name for name in state if "_proj" in name]:
        parts, matrix = pack(rng, state.pop(name))
        state |= {name.removesuffix(".weight") + end: tensor.contiguous() for end, tensor in parts.items()}
        expected[name] = matrix
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    (folder / "plain").mkdir()
    save_file({name: t.float().contiguous() for name, t in expected.items()}, folder / "plain/model.safetensors")
    (folder / "plain/config.json").write_text(json.dumps(config))
    return open_checkpoint(folder / "plain").build().state_dict()


def check(folder: Path, expected: dict[str, Tensor], note: str) -> None:
    """Asserts that a checkpoint is read as exactly these weights."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.notes == (f"weights are dequantised from {note}",)
    found = checkpoint.build().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def words(codes: np.ndarray, bits: int) -> Tensor:
    """Packs each row of numbers into 32-bit words, as one long number whose lowest bits come first."""
    rows = []
    for row in codes.tolist():
        size = 4 * -(-len(row) * bits // 32)
        number = sum(code << place * bits for place, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(size, "little"), np.int32))
    return torch.from_numpy(np.stack(rows))


def sources(tensors: dict[str, Tensor]) -> dict[str, TensorSource]:
    return {name: TensorSource(tuple(t.shape), lambda index, t=t: t[index]) for name, t in tensors.items()}
