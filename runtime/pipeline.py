"""The command `runtime.pipeline`, which runs a model on several machines.

Each machine has some of the blocks (shards), or a part of every block (slices).

torchrun --nproc-per-node 2 -m runtime.pipeline llama.shards --prompts-file prompts.txt
torchrun --nnodes 3 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
    -m runtime.pipeline llama.shards --prompts-file prompts.txt --journal run.journal

With shards, the first rank passes each text's tokens on and the last rank chooses the next token. Several texts run at
the same time, so that all ranks have work. Every host needs the shards that it runs, or all; the first rank reads the
prompts and prints the results. With slices, every rank takes part in each step, and so chooses the same tokens.
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("runtime.pipeline")

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.errors import InputError
from runtime.cli.flags import add_generation_flags, add_program_flags, add_prompts_file_flag, generation_options
from runtime.cli.results import print_results
from runtime.distributed.assignment import assign_files, measure_host
from runtime.distributed.pipeline_stage import Stage, Texts, pipeline
from runtime.distributed.placement import Host, read_hosts
from runtime.distributed.process_group import ProcessGroup, Ring, Sums, pin_cores
from runtime.distributed.token_log import TokenLog
from runtime.engine.program import Program
from runtime.text.generation import check_ids
from runtime.text.prompts import read_prompts


def _texts(program: Program, process_group: ProcessGroup, options: argparse.Namespace) -> tuple[Texts, TokenLog]:
    """Returns the first rank's texts on every rank, and the journal, which only the first rank writes.

    Raises:
        InputError: the prompts or the journal cannot be used, or the ranks have different options.
    """
    metadata = program.metadata
    generation = replace(generation_options(options), stop_ids=metadata.stop_ids)
    check_ids(generation.sampling, metadata.config.vocab_size)
    given = process_group.all_gather([repr(generation), options.seed])
    for rank, other in enumerate(given):
        if other != given[0]:
            raise InputError(f"rank {rank} has the options {other}, but rank 0 has {given[0]}; give all ranks the same")

    def read() -> tuple[list[Any], TokenLog] | None:
        if process_group.rank > 0:
            return None
        prompts = read_prompts(options.prompts_file, program)
        said = [str(prompt) if isinstance(prompt, InputError) else list(prompt) for prompt in prompts]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        run = {"model": metadata.identity.hex(), "prompts": digest, "options": given[0]}
        return said, TokenLog(options.journal, run)

    first = process_group.run_everywhere(read)
    said, done = process_group.all_gather([first[0], list(first[1].tokens.items())] if first else None)[0]
    prompts = [InputError(prompt) if isinstance(prompt, str) else prompt for prompt in said]
    return Texts(prompts, dict(done), generation, options.seed), first[1] if first else TokenLog(None, {})


def _run(options: argparse.Namespace, process_group: ProcessGroup) -> int:
    threads = process_group.run_everywhere(lambda: pin_cores(options.threads))
    under_way = options.texts or 2 * process_group.count
    mine = assign_files(
        options.folder, process_group, lambda sizes: _host(options, process_group, threads, sizes), under_way
    )
    sliced = mine[0].slices > 1
    program = process_group.run_everywhere(
        lambda: Program(
            [Path(part.path) for part in mine],
            threads=threads,
            check=not options.no_check,
            memory_budget=options.memory_budget,
            partial=not sliced,
            group=Sums(process_group) if sliced and process_group.count > 1 else None,
        )
    )
    texts, token_log = _texts(program, process_group, options)
    stage = Stage(program, Ring(process_group, program.metadata.config.dim, alone=sliced), texts)
    if process_group.rank > 0 and not sliced:
        stage.follow()
        return 0
    results = pipeline(stage, 1 if sliced else under_way, token_log)
    if process_group.rank > 0:
        return 1 if [result for result in results if result.error is not None] else 0
    return print_results(results, f"{process_group.count} ranks", known=sum(map(len, texts.done.values())))


def _host(options: argparse.Namespace, process_group: ProcessGroup, threads: int | None, sizes: Sequence[int]) -> Host:
    """Returns this rank's memory and speed, from the file of hosts or as measured."""
    if options.hosts is None:
        return measure_host(threads or os.cpu_count() or 1, options.memory_budget, sizes)
    hosts = read_hosts(options.hosts, sizes)
    if len(hosts) != process_group.count:
        raise InputError(
            f"--hosts {options.hosts} has {len(hosts)} hosts, but there are {process_group.count} ranks; give one each"
        )
    return hosts[process_group.rank]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command: the first rank prints a JSON object for each prompt, in order, to stdout and the throughput to
    stderr.

    Returns:
        exit code 0, or 1 if a prompt could not be run; for bad input or a lost rank the command ends with 2.
    """
    options = _parser().parse_args(arguments)
    generation_options(options)
    if options.texts is not None and options.texts < 1:
        raise InputError(f"--texts {options.texts} is invalid; give 1 or more")
    process_group = ProcessGroup(options.timeout)
    try:
        return _run(options, process_group)
    finally:
        process_group.close()


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.pipeline", "Runs the shards or slices of a model on several machines.", __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="folder of shards or slices; each host needs those that it runs, or all")
    add_prompts_file_flag(parser)
    add(
        "--texts",
        type=int,
        metavar="N",
        help="number of texts that run at once; always one with slices (default: two per rank)",
    )
    add(
        "--journal",
        type=Path,
        metavar="FILE",
        help="file in which the first rank keeps every token, to continue after a restart",
    )
    add(
        "--hosts",
        type=Path,
        metavar="FILE",
        help="file that describes each rank's host, to assign shards by, see `llama-pte placement --help` (default: "
        "assign them by free memory and its speed)",
    )
    add(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to wait for another rank (default: %(default)g)",
    )
    add_generation_flags(parser)
    add_program_flags(parser)
    return parser
