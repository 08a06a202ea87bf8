"""How much memory a file takes, worked out from its dimensions."""

from dataclasses import dataclass

from export.weights.scheme import Scheme, matrix_sizes
from model.config import ModelConfig
from model.kv_row_format import row_bytes
from runtime.pte.metadata import Metadata, MethodSpec

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of memory of the process's own that running a file takes, beside the runtime itself.

    The file itself is mapped: its pages can be dropped and read again, and are not counted.

    Attributes:
        weights: matrices as the backend packs them at load, once for all methods. 0 where they are used as mapped.
        caches: KV caches for all max_seq_len positions.
        activations: an upper estimate of the intermediate results of the longest step.
    """

    weights: int
    caches: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.caches + self.activations


def memory_use(metadata: Metadata) -> MemoryUse:
    """Works the memory out from the file's dimensions."""
    packed = "XnnpackBackend" in metadata.requirements.backends
    return MemoryUse(
        weights=packed * metadata.matrix_bytes,
        caches=metadata.cache_bytes,
        activations=metadata.activation_bytes,
    )


def cache_bytes(config: ModelConfig, positions: int, kv_dtype: str = "float32") -> int:
    """KV caches of one sequence: keys and values of every layer."""
    slots = sum(config.slots(layer, positions) for layer in range(config.n_layers))
    return 2 * config.n_kv_heads * slots * row_bytes(config.head_dim, kv_dtype)


def matrix_bytes(config: ModelConfig, scheme: Scheme, span: range | None = None) -> int:
    """The matrices that a step multiplies by, or a shard's part of it: all of the blocks', and the head."""
    return sum(matrix_sizes(config, scheme, span).values())


def activation_bytes(config: ModelConfig, method: MethodSpec, positions: int) -> int:
    """The larger of attention's and the feed-forward's working set for a method's tokens of one sequence, the logits,
    and every layer's new cache rows; where attention is not fused also its scores, the mask, and the packed copy of one
    layer's caches that a product takes. The halves of a slice are methods of their own, and each keeps its set.
    """
    length = method.max_length
    attention = length * (4 * config.n_heads * config.head_dim + 2 * config.dim)
    if not method.is_fused:
        attention += length * (3 * config.n_heads + 1) * (positions + length)
        attention += 2 * config.n_kv_heads * positions * config.head_dim
    feed_forward = length * (3 * config.hidden_dim + 2 * config.dim)
    block = config.n_layers * (attention + feed_forward) if method.slices > 1 else max(attention, feed_forward)
    rows = 2 * config.n_layers * config.n_kv_heads * length * config.head_dim
    return (block + rows + method.max_rows * config.vocab_size) * FLOAT
