"""The command `runtime.batch`, which continues many texts at once.

python -m export.llama --batch-size 8 --output batch.pte
python -m runtime.batch batch.pte --prompts-file prompts.txt --max-new-tokens 50
python -m runtime.batch batch.pte --prompts-file prompts.jsonl --temperature 0.8 > results.jsonl

A prompts file has a text in each line, or in each line an object such as {"prompt": "Once"} or {"prompt_ids": [1, 2]}.
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("runtime.batch")

import argparse
from dataclasses import replace
from pathlib import Path

from runtime.cli.flags import (
    add_generation_flags,
    add_program_flags,
    add_prompts_file_flag,
    generation_options,
    open_program,
)
from runtime.cli.results import print_results
from runtime.text.batching import batch
from runtime.text.prompts import read_prompts


def main(arguments: list[str] | None = None) -> int:
    """Runs the command: prints a JSON object for each prompt, in order, to stdout and the throughput to stderr.

    Returns:
        exit code 0, or 1 if a prompt could not be run; for bad input the command ends with 2.
    """
    options = _parser().parse_args(arguments)
    generation = generation_options(options)
    program = open_program(options, options.file)
    generation = replace(generation, stop_ids=program.metadata.stop_ids)
    prompts = read_prompts(options.prompts_file, program)
    results = batch(program, prompts, generation, options.seed)
    return print_results(results, f"{program.metadata.batch_size} at once")


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.batch", "Continues many prompts, several at once.", __doc__)
    add = parser.add_argument
    add("file", type=Path, help=".pte file, exported with --batch-size")
    add_prompts_file_flag(parser)
    add_generation_flags(parser)
    add_program_flags(parser)
    return parser
