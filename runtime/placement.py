"""The command `runtime.placement`, which predicts how fast shards run on several machines, and assigns them.

torchrun --nproc-per-node 2 -m runtime.placement llama.shards --measure > hosts.toml
python -m runtime.placement llama.shards --hosts hosts.toml
python -m runtime.placement llama.shards --hosts hosts.toml --texts 16

The file of hosts is TOML, with one [[hosts]] table per host, in the order in which shards are assigned to them:

    [[hosts]]
    name = "board"
    count = 4                  # number of such hosts (default: 1)
    memory = "3GB"             # memory for weights and caches
    seconds = [0.004, 0.004]   # time of a token in each shard, which --measure finds
    # speed = "9.5GB"          # instead of seconds: bytes of weights processed per second
    latency = 0.0002           # latency to the next host in seconds (default: 0)
    link = "110MB"             # bytes per second to the next host (default: unlimited)
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("runtime.placement")

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path

from model.errors import InputError
from runtime.cli.flags import add_threads_flag
from runtime.distributed.placement import (
    MESSAGE,
    Host,
    available_memory,
    measure_shards,
    place_shards,
    read_hosts,
    to_toml,
)
from runtime.distributed.process_group import ProcessGroup, pin_cores
from runtime.engine.executorch import Shard
from runtime.engine.memory_budget import MARGIN
from runtime.engine.program import files
from runtime.pte.parts import join_parts


def _measure(paths: Sequence[Path], options: argparse.Namespace) -> None:
    """Prints the table of each rank's host; all ranks measure at the same time."""
    process_group = ProcessGroup()
    threads = pin_cores(options.threads)
    seconds = measure_shards(paths, threads, process_group)
    latency, link = process_group.link()
    name = socket.gethostname() + (f" {process_group.rank}" if process_group.count > 1 else "")
    host = Host(name, available_memory(), seconds, latency, link)
    tables = process_group.all_gather(to_toml(host))
    if process_group.rank == 0:
        print("\n\n".join(tables))
    process_group.close()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command: prints a line for each host, and the predicted speeds.

    Returns:
        exit code 0; for bad input the command ends with 2.
    """
    options = _parser().parse_args(arguments)
    shards = sorted((Shard(path) for path in files(options.file)), key=lambda shard: shard.metadata.span.start)
    whole = join_parts({shard.path: shard.metadata for shard in shards})
    if shards[0].metadata.slices > 1:
        raise InputError(f"{options.file} has slices, which all hosts run together; give a folder of shards")
    if options.measure:
        _measure([shard.path for shard in shards], options)
        return 0
    parts = [shard.metadata for shard in shards]
    hosts = read_hosts(options.hosts, [part.matrix_bytes for part in parts])
    texts = options.texts or 2 * min(len(hosts), len(parts))
    sizes = [int(MARGIN * part.matrix_bytes) + texts * part.cache_bytes for part in parts]
    found = place_shards(hosts, sizes, MESSAGE + 4 * whole.config.dim, options.texts)
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
    parser = command.parser(
        "runtime.placement", "Predicts the speed of a model in shards on several machines.", __doc__
    )
    parser.epilog = f"{parser.epilog}\n\n{(__doc__ or '').partition('16')[2].strip()}"
    add = parser.add_argument
    add("file", type=Path, help="folder of shards")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--hosts", type=Path, metavar="FILE", help="TOML file that describes the machines, see below")
    what.add_argument(
        "--measure", action="store_true", help="measure this machine, or all machines that torchrun starts"
    )
    add("--texts", type=int, metavar="N", help="number of texts that run at once (default: two per host)")
    add_threads_flag(parser)
    return parser
