"""Division of a model into shards, so that the largest is as small as possible, or into slices."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from export.lowering.slices import check_groups, slices
from export.lowering.trace import GraphOptions, signatures
from export.weights.scheme import Scheme, embedding_size, matrix_sizes
from model.config import ModelConfig
from model.errors import InputError
from runtime.pte.metadata import MethodSpec


@dataclass(frozen=True)
class Sharding:
    """The division of a model into files.

    Attributes:
        shards: number of shards.
        shard_bytes: maximum size of each shard's matrices in bytes, for as few shards as possible; None to use
            `shards`.
        slices: number of slices, which divide the matrices of every block, see `export.lowering.slices`.
    """

    shards: int = 1
    shard_bytes: int | None = None
    slices: int = 1

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise InputError(f"--shards {self.shards} is invalid; give 1 or more")
        if self.shards > 1 and self.shard_bytes is not None:
            raise InputError("--shards and --shard-bytes cannot be combined; leave one of them out")
        if self.slices < 1:
            raise InputError(f"--tensor-parallel {self.slices} is invalid; give 1 or more")
        if self.slices > 1 and self.has_shards:
            raise InputError(
                f"--tensor-parallel {self.slices} cannot be combined with --shards or --shard-bytes; leave one of "
                "them out"
            )

    @property
    def is_whole(self) -> bool:
        """Whether the model is stored in one file."""
        return not self.has_shards and self.slices == 1

    @property
    def has_shards(self) -> bool:
        """Whether the blocks are divided among files."""
        return self.shards > 1 or self.shard_bytes is not None

    def check(self, graph: GraphOptions) -> None:
        """Checks that the methods are supported for slices.

        Raises:
            InputError: they are not.
        """
        if self.slices > 1 and graph.attention != "fused":
            raise InputError(
                f"--tensor-parallel {self.slices} is unsupported with --attention {graph.attention}; leave "
                "--tensor-parallel out"
            )
        if self.slices > 1 and graph.batch_size > 1:
            raise InputError(
                f"--tensor-parallel {self.slices} cannot be combined with --batch-size {graph.batch_size}; leave one "
                "of them out"
            )

    def methods(self, config: ModelConfig, graph: GraphOptions, scheme: Scheme) -> tuple[tuple[MethodSpec, ...], ...]:
        """Returns the methods of each shard or slice; a single entry if the model is not divided.

        Raises:
            InputError: as in `spans`.
        """
        spans = self.spans(config, scheme)
        if self.slices > 1:
            return slices(config, graph, scheme.kv_dtype, self.slices)
        return tuple(signatures(config, graph, scheme.kv_dtype, span) for span in spans)

    def spans(self, config: ModelConfig, scheme: Scheme) -> tuple[range, ...]:
        """Returns the blocks of each shard, in order. For slices, it is a single range with all blocks.

        Raises:
            InputError: the model has too few blocks, a block exceeds shard_bytes, or the model cannot be divided into
                slices.
        """
        if self.shards > config.n_layers:
            raise InputError(
                f"--shards {self.shards} is more than the model's {config.n_layers} blocks; give at most that"
            )
        if self.slices > 1:
            check_groups(config, scheme, self.slices)
        if self.is_whole or self.slices > 1:
            return (range(config.n_layers),)
        sizes = block_bytes(config, scheme)
        if self.shard_bytes is None:
            return _balanced(sizes, self.shards)
        for count in range(1, config.n_layers + 1):
            spans = _balanced(sizes, count)
            if max(sum(sizes[span.start : span.stop]) for span in spans) <= self.shard_bytes:
                return spans
        raise InputError(
            f"--shard-bytes {self.shard_bytes} is too small for the largest block, which needs {max(sizes)} with its "
            "embedding or head; give at least that"
        )


def block_bytes(config: ModelConfig, scheme: Scheme) -> list[int]:
    """Returns the size in bytes of the matrices of each block. The first block includes the embedding, and the last the
    head.
    """
    sizes = [embedding_size(config, scheme)] + [0] * (config.n_layers - 1)
    for name, size in matrix_sizes(config, scheme).items():
        sizes[-1 if name.startswith("head.") else int(name.split(".")[1])] += size
    return sizes


def _balanced(sizes: Sequence[int], count: int) -> tuple[range, ...]:
    """Divides the sizes into `count` consecutive spans, such that the largest sum is as small as possible."""

    @functools.cache
    def best(start: int, count: int) -> tuple[int, tuple[range, ...]]:
        if count == 1:
            return sum(sizes[start:]), (range(start, len(sizes)),)
        found = []
        for end in range(start + 1, len(sizes) - count + 2):
            largest, spans = best(end, count - 1)
            found.append((max(sum(sizes[start:end]), largest), (range(start, end), *spans)))
        return min(found, key=lambda each: each[0])

    return best(0, count)[1]
