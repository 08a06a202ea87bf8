"""Reader of llama2.c's .bin files: a header followed by float32 tensors, in two versions."""

import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.checkpoints.checkpoint import Checkpoint, LazyWeights, expected_shapes, read_head, rotary_order
from model.config import ModelConfig
from model.errors import InputError

_VERSION_1_MAGIC = 0x616B3432  # "ak42"
_VERSION_1_HEADER = 256
_LEGACY_HEADER = 28

_LAYER_MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
_FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_LEGACY_ORDER = (
    "tok_embeddings",
    "layers.*.attention_norm",
    *(f"layers.*.{name}" for name in _LAYER_MATRICES),
    "layers.*.ffn_norm",
    *(f"layers.*.{name}" for name in _FEED_FORWARD),
    "head.norm",
    "(freq_cis)",
    "head.output",
)
_VERSION_1_ORDER = (
    "layers.*.attention_norm",
    "layers.*.ffn_norm",
    "head.norm",
    "tok_embeddings",
    *(f"layers.*.{name}" for name in _LAYER_MATRICES),
    *(f"layers.*.{name}" for name in _FEED_FORWARD),
    "head.output",
)


def is_version_1(path: Path) -> bool:
    """Returns whether the file starts with the magic number of version 1."""
    head = read_head(path, 8)
    return len(head) == 8 and struct.unpack("<I", head[:4])[0] == _VERSION_1_MAGIC


def is_legacy(path: Path) -> bool:
    """Returns whether the file starts with seven plausible dimensions. The legacy layout has no magic number."""
    head = read_head(path, _LEGACY_HEADER)
    if len(head) < _LEGACY_HEADER:
        return False
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", head)
    sizes_fit = 0 < layers <= 1024 and 0 < kv_heads <= heads <= dim <= 1 << 17 and 0 < hidden <= 1 << 20
    return sizes_fit and dim % heads == 0 and 0 < abs(vocab) <= 1 << 22 and 0 < context <= 1 << 24


def open_version_1(path: Path) -> Checkpoint:
    """Opens a file of version 1, whose header of 256 bytes contains magic number, version and dimensions.

    Raises:
        InputError: the file is truncated, too long, or of another version.
    """
    head = read_head(path, _VERSION_1_HEADER)
    if len(head) < _VERSION_1_HEADER:
        raise InputError(
            f"{path} is truncated: {len(head)} bytes are too few for a llama2.c header; copy the file again"
        )
    version = struct.unpack("<i", head[4:8])[0]
    if version != 1:
        raise InputError(
            f"{path} has the unsupported llama2.c version {version}; export it again as version 1 (float32)"
        )
    config = _config(struct.unpack("<7i", head[8:36]), tied=bool(head[36]))
    return _open(path, config, _VERSION_1_ORDER, _VERSION_1_HEADER)


def open_legacy(path: Path) -> Checkpoint:
    """Opens a file of the legacy layout, whose header of 28 bytes contains only dimensions.

    Raises:
        InputError: the file is truncated or too long.
    """
    dims = struct.unpack("<7i", read_head(path, _LEGACY_HEADER))
    return _open(path, _config(dims, tied=dims[5] > 0), _LEGACY_ORDER, _LEGACY_HEADER)


def _config(dims: tuple[int, ...], tied: bool) -> ModelConfig:
    dim, hidden, layers, heads, kv_heads, vocab, context = dims
    return ModelConfig(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=dim // max(heads, 1),
        hidden_dim=hidden,
        vocab_size=abs(vocab),
        context=context,
        tied=tied,
    )


def _open(path: Path, config: ModelConfig, order: Iterable[str], header: int) -> Checkpoint:
    """Opens consecutive float32 tensors in the given order, in which a starred name stands for one tensor per layer.

    Raises:
        InputError: the file's size does not match its dimensions.
    """
    shapes = expected_shapes(config)
    offset, offsets = header, {}
    for pattern in order:
        if pattern == "(freq_cis)":
            offset += 2 * config.context * (config.head_dim // 2) * 4
            continue
        for layer in range(config.n_layers) if "*" in pattern else (0,):
            name = pattern.replace("*", str(layer)) + ".weight"
            if name in shapes:
                offsets[name] = offset
                offset += int(np.prod(shapes[name])) * 4
    size = path.stat().st_size
    if size != offset:
        problem = "truncated" if size < offset else "too long"
        raise InputError(
            f"{path} is {problem}: it has {size} bytes, but its dimensions need {offset}; copy the file again"
        )

    def read(name: str) -> Tensor:
        mapped = np.memmap(path, np.float32, mode="c", offset=offsets[name], shape=shapes[name])
        return rotary_order(name, torch.from_numpy(mapped), config)

    # llama2.c models are trained with BOS between stories and stop there. Their tokenizers have BOS 1 and EOS 2.
    weights = LazyWeights({name: partial(read, name) for name in shapes})
    return Checkpoint(config, weights, (path,), "llama2.c", bos_id=1, stop_ids=(1, 2))
