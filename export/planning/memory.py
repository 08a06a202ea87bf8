"""Memory required to run a file, computed from its dimensions."""

import os
from dataclasses import dataclass

from export.lowering.backends import BACKENDS
from export.weights.scheme import Scheme, matrices, matrix_sizes
from model.config import ModelConfig
from model.errors import InputError
from model.kv_row_format import row_bytes
from runtime.pte.metadata import Metadata, MethodSpec

FLOAT = 4
"""Size of a float32 in bytes."""


@dataclass(frozen=True)
class MemoryUse:
    """Private memory of a process that runs a file, in bytes, without the runtime itself.

    The file is memory-mapped. Its pages can be dropped and read again, and are not included.

    Attributes:
        weights: matrices as the backend packs them when the file is loaded, once for all methods; 0 if they are used in
            the mapped file.
        caches: KV caches for all max_seq_len positions.
        activations: an upper estimate of the intermediate results of the longest step.
    """

    weights: int
    caches: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.caches + self.activations


def memory_use(metadata: Metadata) -> MemoryUse:
    """Returns the memory computed from the file's dimensions."""
    config, scheme, span = metadata.config, Scheme.of(metadata), metadata.span
    packs = any(row.packs and row.runtime in metadata.requirements.backends for row in BACKENDS.values())
    packed = packed_bytes(config, scheme, span) if packs else 0
    return MemoryUse(
        weights=metadata.matrix_bytes * packed // matrix_bytes(config, scheme, span),  # in slices, an estimate
        caches=metadata.cache_bytes,
        activations=metadata.activation_bytes,
    )


def packed_bytes(config: ModelConfig, scheme: Scheme, span: range | None = None) -> int:
    """Returns the size of the matrices that a backend multiplies by, and not an operator."""
    columns = {name: shape[1] for name, shape in matrices(config, span).items()}
    sizes = matrix_sizes(config, scheme, span)
    return sum(size for name, size in sizes.items() if not scheme.format(name, columns[name]).by_operator)


def cache_bytes(config: ModelConfig, positions: int, kv_dtype: str = "float32") -> int:
    """Returns the size of the KV caches of one sequence: keys and values of every layer."""
    slots = sum(config.slots(layer, positions) for layer in range(config.n_layers))
    return 2 * config.n_kv_heads * slots * row_bytes(config.head_dim, kv_dtype)


def check_caches(config: ModelConfig, max_seq_len: int, count: int, kv_dtype: str) -> None:
    """Checks that the KV caches of `count` sequences are smaller than this machine's memory.

    Raises:
        InputError: they are not.
    """
    need = count * cache_bytes(config, max_seq_len, kv_dtype)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise InputError(
            f"--max-seq-len {max_seq_len} needs KV caches of {need / 1e9:.1f} GB, but this machine has "
            f"{have / 1e9:.1f} GB; give a smaller number"
        )


def matrix_bytes(config: ModelConfig, scheme: Scheme, span: range | None = None) -> int:
    """Returns the size of the matrices that a step multiplies by, in the whole model or in the shard of the blocks
    `span`.
    """
    return sum(matrix_sizes(config, scheme, span).values())


def activation_bytes(config: ModelConfig, method: MethodSpec, positions: int) -> int:
    """Returns an upper estimate of a method's intermediate results for one sequence.

    It is the sum of the larger working set of attention and feed-forward, the logits, and the new cache rows of every
    layer. Without fused attention, attention includes its scores, the mask, and the packed copy of one layer's caches
    for a product. In a slice, each half of a block is a separate method with its own working set, so these are added
    up.
    """
    length = method.max_length
    attention = length * (4 * config.n_heads * config.head_dim + 2 * config.dim)
    if not method.is_fused:
        attention += length * (3 * config.n_heads + 1) * (positions + length)
        attention += 2 * config.n_kv_heads * positions * config.head_dim
    feed_forward = length * (max(1, config.n_chosen_experts) * (3 * config.hidden_dim + config.dim) + config.dim)
    block = config.n_layers * (attention + feed_forward) if method.slices > 1 else max(attention, feed_forward)
    rows = 2 * config.n_layers * config.n_kv_heads * length * config.head_dim
    return (block + rows + method.max_rows * config.vocab_size) * FLOAT
