"""Assigns the files on several hosts to the ranks that run them."""

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
    """A shard or a slice on a host.

    Attributes:
        path: path of its file on that host.
        identity: identity of the export, in hexadecimal digits.
        start, end: the blocks of a shard, end excluded.
        n_layers: number of blocks of the whole model.
        slice, slices: index of the slice and number of slices; 0 and 1 for a shard.
        matrix_bytes: bytes of the matrices that a step reads.
        cache_bytes: bytes of the caches of all active texts.
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
        """Reads the part that a file has; `under_way` is the number of active texts.

        Raises:
            InputError: it is no file of llama-pte.
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
        """The range of the blocks."""
        return range(self.start, self.end)

    @property
    def size(self) -> int:
        """Bytes of memory that the part and its caches take."""
        return int(MARGIN * self.matrix_bytes) + self.cache_bytes


def assign_files(
    folder: Path, process_group: ProcessGroup, able: Callable[[Sequence[int]], Host], under_way: int
) -> list[Part]:
    """Returns the shards or slices in this host's folder that this rank runs.

    Shards are assigned so that the slowest rank is as fast as possible; every rank gets the same number of slices.

    Args:
        able: takes the bytes of each shard's matrices, and returns this rank's memory and its seconds for each shard.
        under_way: number of active texts, whose caches each rank holds.

    Raises:
        InputError: the files on the hosts are not one model, or do not fit.
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
    """Estimates a rank's memory and its seconds for each shard, from the speed at which `cores` cores read memory.

    Args:
        cores: number of cores that read memory together.
        budget: bytes that this process may hold; None for all free memory.
        sizes: bytes of each shard's matrices.
    """
    speed = read_bandwidth(cores)
    free = available_memory() if budget is None else budget - memory()
    return Host("", free, tuple(size / speed for size in sizes))


def _wanted(everywhere: dict[str, Part]) -> list[Part]:
    """Returns one copy of each shard, in the order of their blocks.

    Raises:
        InputError: the shards are not the whole model.
    """
    first = {part.blocks: (name, part) for name, part in reversed(everywhere.items())}
    parts = sorted((part for _, part in first.values()), key=lambda part: part.start)
    blocks = range(parts[0].n_layers)
    check_shards({name: (bytes.fromhex(part.identity), part.blocks) for name, part in first.values()}, blocks)
    return parts


def _shards(
    wanted: Sequence[Part], said: Sequence[Sequence[Part]], able: Sequence[tuple[int, Sequence[float]]]
) -> list[list[Part]]:
    """Returns the shards of each rank, from the files, memory and seconds of all ranks.

    Raises:
        InputError: see `assign_shards`.
    """
    found, hosts = [{part.blocks: part for part in parts} for parts in said], []
    for rank, ((free, seconds), held) in enumerate(zip(able, found, strict=True)):
        possible = (time if part.blocks in held else math.inf for part, time in zip(wanted, seconds, strict=True))
        hosts.append(Host(f"rank {rank}", free, tuple(possible)))
    spans = assign_shards(hosts, [part.size for part in wanted], idle=False)
    return [[held[wanted[number].blocks] for number in span] for held, span in zip(found, spans, strict=True)]


def _slices(said: Sequence[Sequence[Part]]) -> list[list[Part]]:
    """Returns the slices of each rank, from the files of all ranks.

    Raises:
        InputError: the slices cannot be divided evenly, or a rank lacks one of its slices.
    """
    slices = said[0][0].slices
    if slices % len(said):
        raise InputError(
            f"{slices} slices cannot be divided among {len(said)} ranks; start {slices} ranks, or a divisor of it"
        )
    each, found = slices // len(said), list[list[Part]]()
    for rank, parts in enumerate(said):
        held = {part.slice: part for part in parts}
        wanted = range(rank * each, (rank + 1) * each)
        for number in wanted:
            if number not in held:
                raise InputError(f"rank {rank} lacks slice {number + 1} of {slices}; copy it there, or export again")
        found.append([held[number] for number in wanted])
    return found
