"""cut: which blocks go into which shard, so that the largest shard is as small as it can be."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from export.scheme import Scheme, matrices
from model.config import ModelConfig
from model.errors import InputError


@dataclass(frozen=True)
class Cut:
    """How a model is cut.

    Attributes:
        shards: into so many.
        shard_bytes: or into as few as have at most so many bytes of matrices each; None for the former.
    """

    shards: int = 1
    shard_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise InputError(f"--shards {self.shards} is impossible; give 1 or more")
        if self.shards > 1 and self.shard_bytes is not None:
            raise InputError("--shards and --shard-bytes both say where to cut; leave one of them out")

    @property
    def is_whole(self) -> bool:
        """Whether the model stays in one file."""
        return self.shards == 1 and self.shard_bytes is None

    def spans(self, config: ModelConfig, scheme: Scheme) -> tuple[range, ...]:
        """The blocks of each shard, in order.

        Raises:
            InputError: the model has too few blocks.
        """
        if self.shards > config.n_layers:
            raise InputError(f"--shards {self.shards} is more than the model's {config.n_layers} blocks; give fewer")
        if self.is_whole:
            return (range(config.n_layers),)
        sizes = block_bytes(config, scheme)
        if self.shard_bytes is None:
            return _balanced(sizes, self.shards)
        for count in range(1, config.n_layers + 1):
            spans = _balanced(sizes, count)
            if max(sum(sizes[span.start : span.stop]) for span in spans) <= self.shard_bytes:
                return spans
        raise InputError(
            f"--shard-bytes {self.shard_bytes} is less than one block takes, with what comes before or behind it "
            f"{max(sizes)}; give at least that"
        )


def block_bytes(config: ModelConfig, scheme: Scheme) -> list[int]:
    """Bytes of the matrices of each block; the embedding's go with the first one's, and the head's with the last's."""
    sizes = [0] * config.n_layers
    embedding = ("tok_embeddings.weight", (config.vocab_size, config.dim))
    for name, shape in (embedding, *matrices(config).items()):
        layer = {"tok_embeddings": 0, "head": -1}.get(name.split(".", 1)[0])
        sizes[int(name.split(".")[1]) if layer is None else layer] += scheme.format(name, shape[1]).nbytes(*shape)
    return sizes


def _balanced(sizes: Sequence[int], count: int) -> tuple[range, ...]:
    """`count` spans of which the largest is smallest."""

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
