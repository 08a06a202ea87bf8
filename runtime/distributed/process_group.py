"""The processes that run one model together, on one host or several, and their communication.

`torchrun` starts the processes and gives each its rank; torch.distributed with gloo connects them. A single process is
a group of one.
"""

import json
import math
import os
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import InputError

START = timedelta(minutes=30)
"""Maximum time for which ranks wait for each other before the first step; one may have gigabytes to read."""

LARGE = 1 << 20
"""Bytes of the message that measures a link's speed."""

T = TypeVar("T")


class LostPeerError(ConnectionError):
    """Raised if another process ended or did not answer in time."""


class ProcessGroup:
    """The group of processes that run one model, seen from this process.

    Attributes:
        rank: index of this process, from 0.
        count: number of processes.
        timeout: maximum time for which a step waits for another rank.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        """Connects to the other processes, and waits until all are connected.

        Args:
            timeout: maximum time for which a step waits for another rank, in seconds.

        Raises:
            InputError: the timeout is invalid.
            LostPeerError: the processes do not connect in time.
        """
        if not timeout > 0:
            raise InputError(f"--timeout {timeout} is invalid; give more than 0 seconds")
        self.timeout = timedelta(seconds=timeout)
        self.rank, self.count = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
        if self.count > 1:
            with _lost("all ranks", START):
                dist.init_process_group("gloo", timeout=START)

    def close(self) -> None:
        """Leaves the group."""
        if self.count > 1:
            dist.destroy_process_group()

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values that all ranks pass, in their order; all ranks call it. Values are of JSON types.

        Raises:
            LostPeerError: a rank ended or did not answer in time.
        """
        if self.count == 1:
            return [value]
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths, longest = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)], len(said)
        with _lost("all ranks", START):
            dist.all_gather(lengths, torch.tensor([len(said)]))
            longest = max(map(int, lengths))
            found = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
            dist.all_gather(found, torch.cat((said, said.new_zeros(longest - len(said)))))
        return [json.loads(text.numpy()[: int(length)].tobytes()) for text, length in zip(found, lengths, strict=True)]

    def run_everywhere(self, call: Callable[[], T]) -> T:
        """Calls `call` on every rank and returns its result on this one, if it succeeds on all; all ranks call it.

        Raises:
            InputError: it fails on a rank; the message names the rank.
            LostPeerError: a rank ended or did not answer in time.
        """
        failure, result = None, list[T]()
        try:
            result.append(call())
        except (InputError, OSError) as error:
            failure = str(error)
        for rank, said in enumerate(self.all_gather(failure)):
            if said is not None:
                raise InputError(f"rank {rank}: {said}" if self.count > 1 else said)
        return result[0]

    def link(self) -> tuple[float, float]:
        """Measures the seconds that a small message takes to the next rank, and the bytes a second of a large one.

        All ranks call it.

        Raises:
            LostPeerError: a rank ended or did not answer in time.
        """
        found = (0.0, math.inf)
        for rank in range(self.count if self.count > 1 else 0):
            other = (rank + 1) % self.count
            with _lost(f"rank {other}", START):
                small, large = (self._there_and_back(rank, other, size) for size in (1, LARGE))
                dist.barrier()
            if rank == self.rank:
                found = (small / 2, LARGE / max(large / 2 - small / 2, 1e-9))
        return found

    def _there_and_back(self, rank: int, other: int, size: int) -> float:
        """Measures the seconds of a message from one rank to another and back.

        Returns the second-shortest of eight times, because the first ones open connections.
        """
        message, times = torch.zeros(size, dtype=torch.uint8), list[float]()
        for _ in range(8):
            start = time.perf_counter()
            if self.rank == rank:
                dist.send(message, other)
                dist.recv(message, other)
            elif self.rank == other:
                dist.recv(message, rank)
                dist.send(message, rank)
            times.append(time.perf_counter() - start)
        return sorted(times)[1]


def pin_cores(threads: int | None) -> int | None:
    """Binds this process to the cores that the environment variable LLAMA_PTE_DEVICE names, such as cpu:0-3 or cpu:2.

    Args:
        threads: number of threads that the user gave, or None.

    Returns:
        the number of threads to use: `threads` if given; else one for each named core; else, without named cores, a
        share of the cores if several ranks are on the host, or None.

    Raises:
        InputError: the variable does not name cores of this machine.
    """
    device, here = os.environ.get("LLAMA_PTE_DEVICE"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device is None or device == "cpu":
        return threads or (max((os.cpu_count() or 1) // here, 1) if here > 1 else None)
    found = re.fullmatch(r"cpu:(\d+)(?:-(\d+))?", device)
    cores = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        raise InputError(
            f"LLAMA_PTE_DEVICE={device} is invalid on this machine; give cpu, or some of its {os.cpu_count()} cores "
            "such as cpu:0-1"
        ) from error
    return threads or len(cores)


class Ring:
    """The connection from each rank to the next one, and from the last to the first.

    A message has integers and may have a stream [1, L, D]. Messages use their own sockets, because the operating system
    sends them while this process computes. gloo would need a thread to wake up while all cores compute; see
    tests/bench/NOTES.md.
    """

    def __init__(self, process_group: ProcessGroup, dim: int, alone: bool = False) -> None:
        """Connects the ranks.

        Args:
            dim: width of the stream (D).
            alone: whether this rank sends only to itself, as it does if it is the only one.

        Raises:
            LostPeerError: a rank does not connect in time.
        """
        self._timeout, self._dim = process_group.timeout, dim
        self._before, self._behind = (
            (process_group.rank - 1) % process_group.count,
            (process_group.rank + 1) % process_group.count,
        )
        self._to_itself = deque[tuple[list[int], Tensor | None]]()
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        if not alone and process_group.count > 1:
            self._sockets = self._connected(process_group)

    def _connected(self, process_group: ProcessGroup) -> tuple[socket.socket, socket.socket]:
        """Returns sockets to the previous and the next rank. A connection must send a key that only ranks have."""
        with socket.create_server(("", 0)) as server:
            server.settimeout(self._timeout.total_seconds())
            said = process_group.all_gather([_address(), server.getsockname()[1], secrets.token_hex(16)])
            address, port, key = said[self._behind]
            with _lost(f"rank {self._behind}", self._timeout):
                behind = socket.create_connection((address, port), self._timeout.total_seconds())
                behind.sendall(bytes.fromhex(key))
            with _lost(f"rank {self._before}", self._timeout):
                while True:
                    before, _ = server.accept()
                    before.settimeout(self._timeout.total_seconds())
                    if secrets.compare_digest(_read(before, 16), bytes.fromhex(said[process_group.rank][2])):
                        break
                    before.close()
        behind.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return before, behind

    def send(self, integers: Sequence[int], stream: Tensor | None = None) -> None:
        """Sends a message to the next rank.

        Raises:
            LostPeerError: the rank ended, or did not receive earlier messages in time.
        """
        if self._sockets is None:
            self._to_itself.append((list(integers), stream))
            return
        floats = np.empty(0, np.float32) if stream is None else stream.numpy()
        head = np.array([len(integers), floats.size, *integers], np.int64)
        with _lost(f"rank {self._behind}", self._timeout):
            self._sockets[1].sendall(head.tobytes() + floats.tobytes())

    def receive(self) -> tuple[list[int], Tensor | None]:
        """Receives the next message from the previous rank.

        Raises:
            LostPeerError: the message does not arrive in time.
        """
        if self._sockets is None:
            return self._to_itself.popleft()
        with _lost(f"rank {self._before}", self._timeout):
            n_integers, n_floats = np.frombuffer(_read(self._sockets[0], 16), np.int64).tolist()
            integers = np.frombuffer(_read(self._sockets[0], 8 * n_integers), np.int64).tolist()
            if not n_floats:
                return integers, None
            floats = np.frombuffer(_read(self._sockets[0], 4 * n_floats), np.float32)
        return integers, torch.from_numpy(floats).view(1, -1, self._dim)

    def close(self) -> None:
        """Closes the sockets; messages already sent still arrive."""
        for each in self._sockets or ():
            each.close()


def _address() -> str:
    """Returns this host's address for other ranks: the one that it uses to reach the first rank."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.connect((os.environ["MASTER_ADDR"], 1))  # sends nothing
        return str(found.getsockname()[0])


def _read(source: socket.socket, size: int) -> bytearray:
    """Reads exactly `size` bytes.

    Raises:
        ConnectionError: the connection was closed.
    """
    found = bytearray(size)
    rest = memoryview(found)
    while rest:
        count = source.recv_into(rest)
        if count == 0:
            raise ConnectionError("it closed the connection")
        rest = rest[count:]
    return found


class Sums:
    """The group of processes that have the slices of a model; see `runtime.engine.tensor_parallel`."""

    def __init__(self, process_group: ProcessGroup) -> None:
        self._count, self._timeout = process_group.count, process_group.timeout

    def summed(self, tensor: Tensor) -> Tensor:
        """Returns the sum of all ranks' tensors, which have the same shape; overwrites `tensor`.

        Raises:
            LostPeerError: a rank's tensor does not arrive in time.
        """
        with _lost("all ranks", self._timeout):
            _started(dist.all_reduce(tensor, async_op=True)).wait(self._timeout)
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """Returns all ranks' tensors, [..., n] each, joined to [..., count * n] in the ranks' order.

        Raises:
            LostPeerError: a rank's tensor does not arrive in time.
        """
        found = [torch.empty_like(tensor) for _ in range(self._count)]
        with _lost("all ranks", self._timeout):
            _started(dist.all_gather(found, tensor, async_op=True)).wait(self._timeout)
        return torch.from_numpy(np.concatenate([each.numpy() for each in found], axis=-1))


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not of the group"
    return work


@contextmanager
def _lost(who: str, timeout: timedelta) -> Iterator[None]:
    """Turns errors of gloo and sockets into LostPeerError, whose message names the rank."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # from gloo, and from sockets
        reason = str(error).split("] ", 1)[-1].splitlines()[0]
        raise LostPeerError(
            f"{who} ended or did not answer within {timeout.total_seconds():g} s ({reason}); start all of them again, "
            "with the same --journal to continue after the last token"
        ) from error
