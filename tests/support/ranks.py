"""Starts processes that form a torch.distributed group, as torchrun does."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

NETEM = ("netem", "delay", "2ms", "rate", "100mbit")
RATE = ("tbf", "rate", "100mbit", "burst", "32kbit", "latency", "400ms")
"""Arguments of tc, which limits the network's speed."""


def start(
    commands: Sequence[Sequence[str | Path]],
    environments: Sequence[Mapping[str, str]] | None = None,
    prefixes: Sequence[Sequence[str]] | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts one process per rank, each with `python -m` and its command.

    Args:
        environments: environment variables of each rank, in addition to this process's.
        prefixes: a command for each rank that runs the process, such as `ip netns exec`.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    count = str(len(commands))
    together = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [*(prefixes[rank] if prefixes else ()), sys.executable, "-m", *map(str, command)],
            env=os.environ | together | {"RANK": str(rank)} | dict(environments[rank] if environments else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def ended(ranks: Sequence[subprocess.Popen[str]], within: float = 120.0) -> list[tuple[int, str, str]]:
    """Waits for all ranks and returns each one's exit code, stdout and stderr."""
    try:
        found = [rank.communicate(timeout=within) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(rank.returncode, *printed) for rank, printed in zip(ranks, found, strict=True)]


@contextmanager
def hosts(count: int) -> Iterator[list[tuple[list[str], dict[str, str]]]]:
    """Creates network namespaces that act as hosts on one switch. Yields, for each, the command prefix that runs a
    process in it and the environment for torch.distributed. Links are limited to 100 Mbit/s and, if the kernel has
    netem, delayed by 2 ms.
    """
    tag = f"lp{os.getpid() % 100_000}"
    names = [f"{tag}-{number}" for number in range(count + 1)]
    switch, *others = names

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "-n", switch, "link", "add", "bridge", "up", "type", "bridge")
        for number, name in enumerate(others, 1):
            run("ip", "link", "add", f"p{number}", "netns", switch, "type", "veth", "peer", "host", "netns", name)
            run("ip", "-n", switch, "link", "set", f"p{number}", "master", "bridge", "up")
            run("ip", "-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "host")
            for device in ("host", "lo"):
                run("ip", "-n", name, "link", "set", device, "up")
            try:
                run("tc", "-n", name, "qdisc", "add", "dev", "host", "root", *NETEM)
            except subprocess.CalledProcessError:  # this kernel has no netem
                run("tc", "-n", name, "qdisc", "add", "dev", "host", "root", *RATE)
        torch_environment = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "host", "LOCAL_WORLD_SIZE": "1"}
        yield [(["ip", "netns", "exec", name], torch_environment) for name in others]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
