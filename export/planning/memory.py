"""Memory required to run a file, computed from its dimensions."""

from dataclasses import dataclass

from export.lowering.backends import BACKENDS
from export.weights.scheme import Scheme, matrix_sizes
from model.config import ModelConfig
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
    scheme = Scheme.of(metadata)
    packed = any(row.packs and row.runtime in metadata.requirements.backends for row in BACKENDS.values())
    packed = packed and not scheme.linear.by_operator
    return MemoryUse(
        weights=packed * metadata.matrix_bytes,
        caches=metadata.cache_bytes,
        activations=metadata.activation_bytes,
    )


def cache_bytes(config: ModelConfig, positions: int, kv_dtype: str = "float32") -> int:
    """Returns the size of the KV caches of one sequence: keys and values of every layer."""
    slots = sum(config.slots(layer, positions) for layer in range(config.n_layers))
    return 2 * config.n_kv_heads * slots * row_bytes(config.head_dim, kv_dtype)


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
