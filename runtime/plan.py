"""The command that says how fast a model in shards would be on several machines, and which of them should have which.

torchrun --nproc-per-node 2 -m runtime.plan llama.shards --measure > hosts.toml
python -m runtime.plan llama.shards --hosts hosts.toml
python -m runtime.plan llama.shards --hosts hosts.toml --texts 16

A file of hosts has a table for each, in the order in which they pass a text on:

    [[hosts]]
    name = "board"
    count = 4                  # so many alike (default: 1)
    memory = "3GB"             # for weights and caches
    seconds = [0.004, 0.004]   # that a token takes in each shard, as --measure finds it; or, for all of them,
    speed = "9.5GB"            # bytes of matrices multiplied by in a second
    latency = 0.0002           # seconds to the next host (default: 0)
    link = "110MB"             # bytes in a second to there (default: any number)
"""

from model import command

if __name__ == "__main__":
    command.start("runtime.plan")

import argparse
import math
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from export.metadata import STREAM
from export.together import joined
from model.command import byte_count
from model.errors import InputError, listed
from runtime.flags import add_threads_flag
from runtime.meter import median_seconds
from runtime.peers import Peers, place
from runtime.program import Program, files
from runtime.residency import MARGIN
from runtime.session import Session
from runtime.shard import Shard

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MESSAGE = 64
"""Bytes that go with a stream from host to host."""

STEPS = 64
"""Tokens by which a shard is measured: their median time counts."""


@dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        name: what it is called.
        memory: bytes for weights and caches.
        seconds: that a token takes in each shard; infinite where it does not have one.
        latency: seconds that a message takes to the next host, however short.
        link: bytes a second to there.
    """

    name: str
    memory: int
    seconds: tuple[float, ...]
    latency: float = 0.0
    link: float = math.inf


@dataclass(frozen=True)
class Plan:
    """Which shards are where, and what comes of it.

    Attributes:
        spans: of each host, its shards; none where it is not needed.
        stages: seconds that a token takes in each.
        round: seconds of one text from token to token.
        rate: tokens a second, of all texts together.
        bottleneck: what it is bound by.
    """

    spans: tuple[range, ...]
    stages: tuple[float, ...]
    round: float
    rate: float
    bottleneck: str


def assigned(hosts: Sequence[Host], sizes: Sequence[int], idle: bool = True) -> tuple[range, ...]:
    """Each host's shards, neighbours in the order of the hosts, so that the slowest host is as fast as it can be.

    Args:
        sizes: bytes that each shard takes.
        idle: whether hosts may remain without.

    Raises:
        InputError: the hosts have too little memory together, or lack a shard.
    """
    slowest, choices = [0.0, *[math.inf] * len(sizes)], list[list[int]]()  # by how many shards the hosts so far have
    for host in hosts:
        following, choice = [math.inf] * len(slowest), [0] * len(slowest)
        for end in range(len(slowest)):
            size, seconds = 0, 0.0
            for start in range(end, -1, -1):
                if start < end:
                    size, seconds = size + sizes[start], seconds + host.seconds[start]
                if size > host.memory or math.isinf(seconds):
                    break
                found = max(slowest[start], seconds)
                if found < following[end] and (idle or start < end):
                    following[end], choice[end] = found, start
        slowest = following
        choices.append(choice)
    if math.isinf(slowest[-1]):
        raise InputError(_why_not(hosts, sizes, idle))
    spans, end = list[range](), len(sizes)
    for choice in reversed(choices):
        spans.append(range(choice[end], end))
        end = choice[end]
    return tuple(reversed(spans))


def _why_not(hosts: Sequence[Host], sizes: Sequence[int], idle: bool) -> str:
    """Why shards cannot be assigned."""
    if len(hosts) > len(sizes) and not idle:
        return f"{len(hosts)} ranks need as many shards, and there are {len(sizes)}; export with --shards {len(hosts)}"
    have = sum(host.memory for host in hosts)
    return (
        f"{len(sizes)} shards of {sum(sizes) / 1e6:.0f} MB with caches, the largest of {max(sizes) / 1e6:.0f} MB, "
        f"cannot be given in order to {len(hosts)} hosts with {have / 1e6:.0f} MB that each have the files of theirs; "
        "give more hosts or memory, or copy missing shards"
    )


def planned(hosts: Sequence[Host], sizes: Sequence[int], message: int, texts: int | None = None) -> Plan:
    """The best assignment, and how fast tokens come from it.

    A host works on one text at a time, and a link carries one message at a time: what is slowest of these bounds the
    rate. And so does the way of one text through all of them, of which there are only so many.

    Args:
        message: bytes that pass from host to host for a token.
        texts: in flight together; None for two on each host that is needed.

    Raises:
        InputError: see `assigned`.
    """
    spans = assigned(hosts, sizes)
    stages = tuple(sum(host.seconds[span.start : span.stop]) for host, span in zip(hosts, spans, strict=True))
    used = [number for number, span in enumerate(spans) if span]
    texts = texts or 2 * len(used)
    carried = [message / hosts[number].link if len(used) > 1 else 0.0 for number in used]
    way = sum(stages) + sum(carried) + sum(hosts[number].latency for number in used if len(used) > 1)
    bounds = {f"host {hosts[number].name}": 1 / stages[number] for number in used}
    bounds |= {f"the link behind {hosts[n].name}": 1 / time for n, time in zip(used, carried, strict=True) if time}
    bounds[f"the way of {texts} texts"] = texts / way
    bottleneck = min(bounds, key=lambda name: bounds[name])
    return Plan(spans, stages, way, bounds[bottleneck], bottleneck)


def measured(paths: Sequence[Path], threads: int | None, peers: Peers) -> tuple[float, ...]:
    """Seconds that a token takes in each shard here, in the middle of the context, while all ranks measure the same."""
    found = []
    for path in paths:
        program = Program([path], threads=threads, check=False, partial=True)
        metadata, session = program.metadata, Session(program)
        method = min(metadata.methods, key=lambda method: method.max_length)
        stream = next((spec.zeros(method.min_length) for spec in method.inputs if spec.name == STREAM), None)
        if metadata.use_kv_cache:
            session.cache.position = session.capacity // 2

        def step(session: Session = session, stream: Tensor | None = stream) -> None:
            session.pass_on([0], stream)
            session.cache.rewind(session.position - 1)

        step()
        peers.shared(None)
        found.append(median_seconds(step, STEPS))
    return tuple(found)


def available() -> int:
    """Bytes of memory that are free on this host, shared by its ranks."""
    free = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", free.read_text()) if free.exists() else None
    have = int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return have // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def read_hosts(path: Path, sizes: Sequence[int]) -> list[Host]:
    """The hosts in a file of them; see the top of this module.

    Args:
        sizes: bytes of each shard's matrices.

    Raises:
        InputError: it cannot be read, or says something else.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))["hosts"]
        return [host for table in tables for host in _hosts(table, sizes)]
    except OSError as error:
        raise InputError(f"--hosts {path} cannot be read ({error.strerror}); give a file of hosts") from error
    except (tomllib.TOMLDecodeError, argparse.ArgumentTypeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--hosts {path} is no file of hosts ({error}); see python -m runtime.plan --help") from error


def _hosts(table: Mapping[str, Any], sizes: Sequence[int]) -> list[Host]:
    known = {"name", "count", "memory", "seconds", "speed", "latency", "link"}
    if unknown := table.keys() - known:
        raise ValueError(f"{listed(unknown)} is unknown; known are {listed(known, len(known))}")
    if ("seconds" in table) == ("speed" in table):
        raise ValueError(f"{table['name']} needs one of seconds and speed")
    speed = byte_count(table["speed"]) if "speed" in table else 1
    seconds = tuple(map(float, table["seconds"])) if "seconds" in table else tuple(size / speed for size in sizes)
    if len(seconds) != len(sizes):
        raise ValueError(f"{table['name']} has the seconds of {len(seconds)} shards, and there are {len(sizes)}")
    link = byte_count(table["link"]) if "link" in table else math.inf
    host = Host(table["name"], byte_count(table["memory"]), seconds, float(table.get("latency", 0.0)), link)
    count = int(table.get("count", 1))
    return [host] if count == 1 else [replace(host, name=f"{host.name} {i}") for i in range(1, count + 1)]


def written(host: Host) -> str:
    """A host's table, as `read_hosts` reads it."""
    lines = ["[[hosts]]", f'name = "{host.name}"', f'memory = "{host.memory}B"']
    lines.append(f"seconds = [{', '.join(f'{seconds:.3g}' for seconds in host.seconds)}]")
    if math.isfinite(host.link):
        lines += [f"latency = {host.latency:.3g}", f'link = "{host.link:.0f}B"']
    return "\n".join(lines)


def _measure(paths: Sequence[Path], options: argparse.Namespace) -> None:
    """Prints the table of each rank's host, which all measure at the same time."""
    peers = Peers()
    threads = place(options.threads)
    seconds = measured(paths, threads, peers)
    latency, link = peers.link()
    name = socket.gethostname() + (f" {peers.rank}" if peers.count > 1 else "")
    host = Host(name, available(), seconds, latency, link)
    tables = peers.shared(written(host))
    if peers.rank == 0:
        print("\n\n".join(tables))
    peers.close()


def main(arguments: list[str] | None = None) -> int:
    """The command: a line for each host, and the rates; exit code 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    shards = sorted((Shard(path) for path in files(options.file)), key=lambda shard: shard.metadata.span.start)
    whole = joined({shard.path: shard.metadata for shard in shards})
    if shards[0].metadata.slices > 1:
        raise InputError(f"{options.file} has slices, which all hosts run together; give a folder of shards")
    if options.measure:
        _measure([shard.path for shard in shards], options)
        return 0
    parts = [shard.metadata for shard in shards]
    hosts = read_hosts(options.hosts, [part.matrix_bytes for part in parts])
    texts = options.texts or 2 * min(len(hosts), len(parts))
    sizes = [int(MARGIN * part.matrix_bytes) + texts * part.cache_bytes for part in parts]
    found = planned(hosts, sizes, MESSAGE + 4 * whole.config.dim, options.texts)
    print(f"{'host':20} {'shards':>9} {'MB':>8} {'ms a token':>11} {'busy':>5}")
    for host, span, seconds in zip(hosts, found.spans, found.stages, strict=True):
        if span:
            taken = sum(sizes[span.start : span.stop]) / 1e6
            shown = f"{span.start + 1}-{span.stop}"
            print(f"{host.name:20} {shown:>9} {taken:8.1f} {1e3 * seconds:11.2f} {seconds * found.rate:5.0%}")
    print(
        f"{found.rate:.1f} tok/s with {texts} texts together, {1 / found.round:.1f} tok/s with one; "
        f"bound by {found.bottleneck}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.plan", "Says how fast a model in shards would be on several machines.", __doc__)
    parser.epilog = f"{parser.epilog}\n\n{(__doc__ or '').partition('16')[2].strip()}"
    add = parser.add_argument
    add("file", type=Path, help="the folder of shards")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--hosts", type=Path, metavar="FILE", help="the machines, see below")
    what.add_argument("--measure", action="store_true", help="measure this machine, or all that torchrun starts it on")
    add("--texts", type=int, metavar="N", help="in flight together (default: two for each host)")
    add_threads_flag(parser)
    return parser
