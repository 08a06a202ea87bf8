"""assignment: which of the files on several hosts each rank is to run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from model.errors import InputError
from runtime.distributed.placement import Host, assign_shards, available_memory
from runtime.distributed.process_group import ProcessGroup
from runtime.engine.executorch import Shard, read_bandwidth
from runtime.engine.measure import memory
from runtime.engine.memory_budget import MARGIN
from runtime.engine.program import files
from runtime.pte.parts import check_same_export, check_shards
from runtime.pte.trailer import check_file


@dataclass(frozen=True)
class Part:
    """A shard or a slice on some host.

    Attributes:
        path: of its file there.
        identity: of the export, in hexadecimal digits.
        start, end: a shard's blocks, end excluded.
        n_layers: the model's.
        slice, slices: which of how many slices it is; 0 of 1 where it is a shard.
        matrix_bytes: what a step reads.
        cache_bytes: of the texts under way.
    """

    path: str
    identity: str
    start: int
    end: int
    n_layers: int
    slice: int
    slices: int
    matrix_bytes: int
    cache_bytes: int

    @staticmethod
    def of(path: Path, under_way: int) -> "Part":
        """What a file says of itself.

        Raises:
            InputError: it is none of ours.
        """
        check_file(path, checksum=False)
        found = Shard(path).metadata
        return Part(
            path=str(path),
            identity=found.identity.hex(),
            start=found.methods[0].start_layer,
            end=found.methods[-1].end_layer,
            n_layers=found.config.n_layers,
            slice=found.slice,
            slices=found.slices,
            matrix_bytes=found.matrix_bytes,
            cache_bytes=under_way * found.cache_bytes,
        )

    @property
    def blocks(self) -> range:
        """From start to end."""
        return range(self.start, self.end)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return int(MARGIN * self.matrix_bytes) + self.cache_bytes


def assign_files(
    folder: Path, process_group: ProcessGroup, able: Callable[[Sequence[int]], Host], under_way: int
) -> list[Part]:
    """Those of the shards or slices in this host's folder that this rank is to run.

    Shards are given out so that the slowest rank is as fast as it can be; of slices every rank has as many.

    Args:
        able: this rank's memory, and the seconds that it takes for shards whose matrices have so many bytes.
        under_way: texts whose caches it holds.

    Raises:
        InputError: what the hosts have does not make one model, or does not fit.
    """
    mine = process_group.run_everywhere(lambda: [Part.of(path, under_way) for path in files(folder)])
    said = [[Part(*part) for part in parts] for parts in process_group.all_gather([astuple(part) for part in mine])]
    everywhere = {f"rank {rank}'s {part.path}": part for rank, parts in enumerate(said) for part in parts}
    check_same_export([(name, bytes.fromhex(part.identity)) for name, part in everywhere.items()])
    if mine[0].slices > 1:
        return _slices(said)[process_group.rank]
    parts = _wanted(everywhere)
    host = process_group.run_everywhere(lambda: able([part.matrix_bytes for part in parts]))
    return _shards(parts, said, process_group.all_gather([host.memory, host.seconds]))[process_group.rank]


def measure_host(cores: int, budget: int | None, sizes: Sequence[int]) -> Host:
    """What a rank can do by the speed at which so many cores together read memory.

    Args:
        budget: bytes that this process may hold; None for all that are free.
    """
    speed = read_bandwidth(cores)
    free = available_memory() if budget is None else budget - memory()
    return Host("", free, tuple(size / speed for size in sizes))


def _wanted(everywhere: dict[str, Part]) -> list[Part]:
    """One of each shard in order, of all that there are.

    Raises:
        InputError: they are not the whole model.
    """
    first = {part.blocks: (name, part) for name, part in reversed(everywhere.items())}
    parts = sorted((part for _, part in first.values()), key=lambda part: part.start)
    blocks = range(parts[0].n_layers)
    check_shards({name: (bytes.fromhex(part.identity), part.blocks) for name, part in first.values()}, blocks)
    return parts


def _shards(
    wanted: Sequence[Part], said: Sequence[Sequence[Part]], able: Sequence[tuple[int, Sequence[float]]]
) -> list[list[Part]]:
    """Each rank's, of what all have said: their shards, and their memory and seconds."""
    found, hosts = [{part.blocks: part for part in parts} for parts in said], []
    for rank, ((free, seconds), held) in enumerate(zip(able, found, strict=True)):
        possible = (time if part.blocks in held else math.inf for part, time in zip(wanted, seconds, strict=True))
        hosts.append(Host(f"rank {rank}", free, tuple(possible)))
    spans = assign_shards(hosts, [part.size for part in wanted], idle=False)
    return [[held[wanted[number].blocks] for number in span] for held, span in zip(found, spans, strict=True)]


def _slices(said: Sequence[Sequence[Part]]) -> list[list[Part]]:
    """Each rank's, of the slices that all have said."""
    slices = said[0][0].slices
    if slices % len(said):
        raise InputError(f"{slices} slices cannot be dealt out to {len(said)} ranks; start as many ranks, or a divisor")
    each, found = slices // len(said), list[list[Part]]()
    for rank, parts in enumerate(said):
        held = {part.slice: part for part in parts}
        wanted = range(rank * each, (rank + 1) * each)
        for number in wanted:
            if number not in held:
                raise InputError(f"rank {rank} lacks slice {number + 1} of {slices}; copy it there, or export again")
        found.append([held[number] for number in wanted])
    return found
