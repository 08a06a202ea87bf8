"""SequentialShards: the single file of a model, or its shards, which run one after another."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from runtime.engine.executorch import Shard
from runtime.engine.measure import memory
from runtime.engine.memory_budget import MARGIN, choose_resident
from runtime.pte.metadata import STREAM, Metadata, MethodSpec


class SequentialShards:
    """The shards of a model in the order of their blocks; some of them may be loaded again for each step."""

    def __init__(self, shards: Iterable[Shard], whole: Metadata, memory_budget: int | None) -> None:
        """Loads the shards that stay in memory.

        Raises:
            InputError: the memory budget is too small.
        """
        self._shards = sorted(shards, key=lambda shard: shard.metadata.span.start)
        self._resident = self._choose_resident(whole, memory_budget)
        for shard in sorted(self._resident, key=lambda shard: -shard.metadata.matrix_bytes):  # loading takes twice that
            shard.load()

    def _choose_resident(self, whole: Metadata, memory_budget: int | None) -> list[Shard]:
        """Returns the shards that stay in memory."""
        if memory_budget is None:
            return self._shards
        taken = memory() + whole.activation_bytes + whole.cache_bytes
        sizes = [int(MARGIN * shard.metadata.matrix_bytes) for shard in self._shards]
        return [self._shards[number] for number in sorted(choose_resident(sizes, memory_budget - taken))]

    @property
    def bytes_loaded(self) -> int:
        """Bytes of matrices that are loaded again for each step."""
        return sum(shard.metadata.matrix_bytes for shard in self._shards if shard not in self._resident)

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once, as `runtime.engine.program.Program.step` does."""
        given, outputs = dict(inputs), dict[str, Tensor]()
        for number, shard in enumerate(self._shards, 1):
            following = self._shards[number % len(self._shards)]
            if following not in self._resident:
                following.read_ahead()
            outputs |= shard.run(method.name, given) if shard in self._resident else shard.run_once(method.name, given)
            if number < len(self._shards):
                given[STREAM] = outputs.pop(STREAM)
        return outputs
