"""trace: the eager model becomes one torch.export graph per method, with its signature written down."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.metadata import MethodSpec, TensorSpec
from model.config import ModelConfig
from model.model import Llama


@dataclass(frozen=True)
class Traced:
    """Methods of one file: name -> graph, and the signature of each in the same order."""

    programs: dict[str, ExportedProgram]
    methods: tuple[MethodSpec, ...]


def trace(model: Llama, max_seq_len: int, prefill_chunk: int) -> Traced:
    """Traces `decode` (one token) and, unless the chunk is one token, `prefill` (prefill_chunk tokens).

    Both return the logits of one row. Static shapes: see tests/bench/NOTES.md for what was tried.

    Args:
        max_seq_len: capacity of the caches (T).
        prefill_chunk: L of `prefill`.
    """
    lengths = {"decode": 1} | ({"prefill": prefill_chunk} if prefill_chunk > 1 else {})
    methods = tuple(signature(model.config, name, length, max_seq_len) for name, length in lengths.items())
    graph = _ByName(model)
    with torch.no_grad():
        programs = {
            spec.name: torch.export.export(graph, tuple(map(_example, spec.inputs)), strict=True) for spec in methods
        }
    return Traced(programs, methods)


def signature(config: ModelConfig, name: str, length: int, capacity: int) -> MethodSpec:
    """The whole model for `length` tokens against caches of `capacity` positions."""
    half, heads = config.head_dim // 2, config.n_kv_heads
    layers = range(config.n_layers)

    def caches(role: str, positions: int) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"{role}.{i}", (heads, positions, config.head_dim), "float32") for i in layers)

    return MethodSpec(
        name=name,
        min_length=length,
        max_length=length,
        rows=1,
        start_layer=0,
        end_layer=config.n_layers,
        inputs=(
            TensorSpec("tokens", (1, length), "int64"),
            TensorSpec("cos", (1, length, half), "float32"),
            TensorSpec("sin", (1, length, half), "float32"),
            TensorSpec("mask", (1, length, capacity + length), "float32"),
            TensorSpec("select", (1, length), "float32"),
            *caches("k_cache", capacity),
            *caches("v_cache", capacity),
        ),
        outputs=(
            TensorSpec("logits", (1, config.vocab_size), "float32"),
            *caches("k_rows", length),
            *caches("v_rows", length),
        ),
    )


class _ByName(nn.Module):
    """Llama with the flat arguments and results of a `signature`."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, select: Tensor, *caches: Tensor
    ) -> Sequence[Tensor]:
        layers = len(caches) // 2
        logits, k, v = self.model(tokens, cos, sin, mask, select, caches[:layers], caches[layers:])
        return logits, *k, *v


def _example(spec: TensorSpec) -> Tensor:
    return torch.zeros([size for size in spec.shape if isinstance(size, int)], dtype=getattr(torch, spec.dtype))
