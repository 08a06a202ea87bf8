"""Assigns shards to machines, and predicts how fast these are together."""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from model.errors import InputError, listed
from runtime.cli.command import byte_count
from runtime.distributed.process_group import ProcessGroup
from runtime.engine.measure import median_seconds
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.pte.metadata import STREAM

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MESSAGE = 64
"""Bytes that a message between hosts has beside the stream."""


STEPS = 64
"""Number of tokens with which a shard is measured; the median of their times is used."""


@dataclass(frozen=True)
class Host:
    """A machine.

    Attributes:
        name: name for messages.
        memory: bytes available for weights and caches.
        seconds: seconds that a token takes in each shard; infinite for a shard that the machine does not have.
        latency: seconds that a message of any length takes to the next host, at least.
        link: bytes a second to the next host.
    """

    name: str
    memory: int
    seconds: tuple[float, ...]
    latency: float = 0.0
    link: float = math.inf


@dataclass(frozen=True)
class Placement:
    """An assignment of shards to hosts, and its predicted speed.

    Attributes:
        spans: the shards of each host; empty for a host that is not needed.
        stages: seconds that a token takes on each host.
        round: seconds from one token of a text to its next.
        rate: tokens a second of all texts together.
        bottleneck: description of what limits the rate.
    """

    spans: tuple[range, ...]
    stages: tuple[float, ...]
    round: float
    rate: float
    bottleneck: str


def assign_shards(hosts: Sequence[Host], sizes: Sequence[int], idle: bool = True) -> tuple[range, ...]:
    """Assigns consecutive shards to each host, in the hosts' order, so that the slowest host is as fast as possible.

    Args:
        sizes: bytes that each shard takes.
        idle: whether a host may get no shards.

    Raises:
        InputError: the hosts have too little memory, or lack a shard.
    """
    slowest, choices = [0.0, *[math.inf] * len(sizes)], list[list[int]]()  # index: number of shards on the hosts so far
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
    """Returns the message for shards that cannot be assigned."""
    if len(hosts) > len(sizes) and not idle:
        return f"{len(hosts)} ranks need as many shards, but there are {len(sizes)}; export with --shards {len(hosts)}"
    have = sum(host.memory for host in hosts)
    return (
        f"{len(sizes)} shards of {sum(sizes) / 1e6:.0f} MB with caches, the largest of {max(sizes) / 1e6:.0f} MB, "
        f"cannot be assigned in order to {len(hosts)} hosts with {have / 1e6:.0f} MB and the files that they have; "
        "give more hosts or memory, or copy missing shards"
    )


def place_shards(hosts: Sequence[Host], sizes: Sequence[int], message: int, texts: int | None = None) -> Placement:
    """Returns the best assignment and its predicted speed.

    A host runs one text at a time, and a link carries one message at a time, so the slowest of them bounds the rate.
    The rate is also at most the number of texts divided by the time of a token through all hosts and links.

    Args:
        message: bytes that pass from host to host for a token.
        texts: number of texts that run at once; None for two on each host that is needed.

    Raises:
        InputError: see `assign_shards`.
    """
    spans = assign_shards(hosts, sizes)
    stages = tuple(sum(host.seconds[span.start : span.stop]) for host, span in zip(hosts, spans, strict=True))
    used = [number for number, span in enumerate(spans) if span]
    texts = texts or 2 * len(used)
    carried = [message / hosts[number].link if len(used) > 1 else 0.0 for number in used]
    way = sum(stages) + sum(carried) + sum(hosts[number].latency for number in used if len(used) > 1)
    bounds = {f"host {hosts[number].name}": 1 / stages[number] for number in used}
    bounds |= {f"the link behind {hosts[n].name}": 1 / time for n, time in zip(used, carried, strict=True) if time}
    bounds[f"the time of {texts} texts through all hosts"] = texts / way
    bottleneck = min(bounds, key=lambda name: bounds[name])
    return Placement(spans, stages, way, bounds[bottleneck], bottleneck)


def measure_shards(paths: Sequence[Path], threads: int | None, process_group: ProcessGroup) -> tuple[float, ...]:
    """Measures the seconds that a token takes in each shard on this host, while all ranks measure the same shard.

    The token's position is the middle of the context.
    """
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
        process_group.all_gather(None)
        found.append(median_seconds(step, STEPS))
    return tuple(found)


def available_memory() -> int:
    """Returns this rank's share of the free memory of its host, in bytes."""
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def read_hosts(path: Path, sizes: Sequence[int]) -> list[Host]:
    """Reads a file of hosts; see the top of `runtime.placement`.

    Args:
        sizes: bytes of each shard's matrices.

    Raises:
        InputError: the file cannot be read, or has another form.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))["hosts"]
        return [host for table in tables for host in _hosts(table, sizes)]
    except OSError as error:
        raise InputError(f"--hosts {path} cannot be read ({error.strerror}); give a TOML file of hosts") from error
    except (tomllib.TOMLDecodeError, argparse.ArgumentTypeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--hosts {path} is invalid ({error}); see python -m runtime.placement --help") from error


def _hosts(table: Mapping[str, Any], sizes: Sequence[int]) -> list[Host]:
    known = {"name", "count", "memory", "seconds", "speed", "latency", "link"}
    if unknown := table.keys() - known:
        raise ValueError(f"{listed(unknown)} is unknown; known are {listed(known, len(known))}")
    if ("seconds" in table) == ("speed" in table):
        raise ValueError(f"{table['name']} needs either seconds or speed")
    speed = byte_count(table["speed"]) if "speed" in table else 1
    seconds = tuple(map(float, table["seconds"])) if "seconds" in table else tuple(size / speed for size in sizes)
    if len(seconds) != len(sizes):
        raise ValueError(f"{table['name']} has the seconds of {len(seconds)} shards, but there are {len(sizes)}")
    link = byte_count(table["link"]) if "link" in table else math.inf
    host = Host(table["name"], byte_count(table["memory"]), seconds, float(table.get("latency", 0.0)), link)
    count = int(table.get("count", 1))
    return [host] if count == 1 else [replace(host, name=f"{host.name} {i}") for i in range(1, count + 1)]


def to_toml(host: Host) -> str:
    """Returns a host's table in the form that `read_hosts` reads."""
    lines = ["[[hosts]]", f'name = "{host.name}"', f'memory = "{host.memory}B"']
    lines.append(f"seconds = [{', '.join(f'{seconds:.3g}' for seconds in host.seconds)}]")
    if math.isfinite(host.link):
        lines += [f"latency = {host.latency:.3g}", f'link = "{host.link:.0f}B"']
    return "\n".join(lines)
