"""The export command: converts a Llama checkpoint to one self-contained .pte file.

python -m export.llama --max-seq-len 512
python -m export.llama --checkpoint path/to/Llama-3.2-1B --max-seq-len 2048 --output llama.pte
python -m export.llama --checkpoint stories260K.bin --tokenizer tok512.model
python -m export.llama --run "Once upon a time"
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("export.llama")

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from export.checkpoints import hub
from export.checkpoints.adapters import add_lora_flag
from export.checkpoints.layouts import BUILT_IN
from export.lowering.assemble import assemble
from export.lowering.backends import BACKENDS, lowering
from export.lowering.export_cache import ExportCache, default_folder
from export.lowering.lower import lower
from export.lowering.write import write_program
from export.planning.plan import DEFAULT_CHUNK, DEFAULT_CONTEXT, ExportOptions, Plan, plan
from export.planning.scheme_search import DEFAULT_BUDGET, NothingFitsError, choose_scheme
from export.planning.sharding import Sharding
from export.quality.gptq import TOKENS, calibrate
from export.quality.perplexity import Gate
from export.quality.verification import VerificationError, add_flags, verify_once
from export.weights.formats.integer import ROUNDINGS
from export.weights.gguf_types import AS_STORED, QUANTIZE
from export.weights.scheme import GPTQ, IMPORTANCE, matrices
from model.errors import InputError
from model.kv_row_format import KV_DTYPES
from preproc.chat_template import NAMED
from runtime import generate
from runtime.atomic_file import replacing
from runtime.cli import terminal
from runtime.engine.program import files, read_metadata
from runtime.pte.parts import session_methods


class Progress:
    """Progress callbacks; the default does nothing."""

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Encloses one stage. Strings appended to the yielded list describe its result."""
        yield []

    def advance(self, done: int, total: int) -> None:
        """Receives how much of the present stage is done, and how much there is, in stages that can tell."""

    def note(self, line: str) -> None:
        """Receives a message for the user."""


class ConsoleProgress(Progress):
    """Prints a line per stage: name, seconds, result. On a terminal, it shows progress while the stage runs."""

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        start, result = time.monotonic(), list[str]()
        with terminal.progress(name) as self._advance:
            yield result
        terminal.say(f"{name:10} {time.monotonic() - start:5.1f} s  {'; '.join(result)}")

    def advance(self, done: int, total: int) -> None:
        self._advance(done, total)

    def note(self, line: str) -> None:
        terminal.say(line)


def export_llama(options: ExportOptions, progress: Progress | None = None) -> Path:
    """Runs all stages of an export and returns the path of the output: a file, or the folder of shards or slices.

    Each output file is either complete and verified, or unchanged. A file for a backend that cannot be run on this
    machine is not verified; provenance["verified"] is then false.

    Raises:
        InputError: checkpoint, tokenizer or options cannot be used.
        VerificationError: the program's logits differ from the eager model's by more than the format's limits, or
            quantisation increases the perplexity by more than is allowed.
        NothingFitsError: no scheme available to `options.auto` keeps the increase of perplexity within the limit.
    """
    budget = DEFAULT_BUDGET if options.auto and options.max_ppl_increase is None else options.max_ppl_increase
    progress, gate = progress or Progress(), Gate.of(options.eval_text, budget)
    with progress.stage("open") as result:
        planned = plan(options)
        result.append(planned.summary)
        gate.check(options.auto or planned.source.scheme.max_ppl_increase is not None, planned.tokenizer)
    for warning in planned.warnings:
        progress.note(warning)
    planned = choose_scheme(planned, gate, options.auto, progress.note)
    output = planned.output
    if not options.force and _is_already(planned):
        progress.note(f"{output} is up to date; --force exports it again")
        return output
    with _replacing(planned) as temporaries, _calibrated(planned, progress) as planned:
        _write(planned, options, temporaries, progress)
        gc.collect()
        with progress.stage("verify") as result:
            if not planned.provenance["verified"]:
                absent = BACKENDS[options.backend].runtime
                result.append(f"skipped: ExecuTorch on this machine lacks {absent}; check the file on the device")
                return output
            found = verify_once(temporaries, planned.source, gate, _cache(options))
            result.append(found.summary)
        size = sum(temporary.stat().st_size for temporary in temporaries)
        saved = found.save(output, size) if found.report else None
        if found.failure:
            see = f"; {saved} has the details" if saved else ""
            raise VerificationError(f"{found.failure}; {output} was not written{see}")
    return output


@contextmanager
def _calibrated(planned: Plan, progress: Progress) -> Iterator[Plan]:
    """Yields the plan with its matrices calibrated on its texts, if it has any. They are kept in a temporary folder
    during the block.
    """
    if not planned.texts:
        yield planned
        return
    with tempfile.TemporaryDirectory(prefix="llama-pte-") as folder:
        with progress.stage("calibrate") as result:
            max_seq_len = planned.provenance["options"]["max_seq_len"]
            source = calibrate(planned.source, planned.texts, max_seq_len, Path(folder), progress.advance)
            count = sum(map(source.is_calibrated, matrices(source.config)))
            result.append(f"{count} layers, {_tokens(sum(map(len, planned.texts)))}")
        gc.collect()
        yield replace(planned, source=source)


def _write(planned: Plan, options: ExportOptions, paths: Sequence[Path], progress: Progress) -> None:
    source, shards, backend = planned.source, planned.shards, options.backend
    with progress.stage("lower") as result:
        codes = lower(source.config, shards, backend, source.scheme, _cache(options))
        result.append(f"{backend}, {len(codes)} different parts")
        result.extend(f"{method.name} takes {_tokens(method.max_length)}" for method in session_methods(shards[0]))
    for number, (methods, path) in enumerate(zip(shards, paths, strict=True), 1):
        gc.collect()  # graphs contain reference cycles and hold as much memory as their weights
        name = f" {number}" if len(shards) > 1 else ""
        with progress.stage(f"assemble{name}") as result:
            assembled = assemble(source, methods, codes, backend, planned.identity)
            outside = ", ".join(assembled.requirements.operators)
            result.append(f"{assembled.delegates} delegates; kernels outside: {outside}")
        gc.collect()
        with progress.stage(f"write{name}") as result:
            write_program(assembled, planned.metadata(assembled, methods), path, progress.advance)
            result.append(f"{path.stat().st_size / 1e6:.1f} MB")


def _cache(options: ExportOptions) -> ExportCache:
    return ExportCache(default_folder() if options.cache else None)


@contextmanager
def _replacing(planned: Plan) -> Iterator[list[Path]]:
    """Yields temporary files that replace the outputs. Afterwards, files of an earlier sharded or sliced export are
    deleted, including those packed from them by the C++ runner.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(replacing(output, "--output")) for output in planned.outputs]
    if not planned.sharding.is_whole:
        earlier = (*planned.output.glob("*-of-*.pte"), *planned.output.glob("*-of-*.pte.*.packed"))
        for path in set(earlier) - set(planned.outputs):
            path.unlink()


def _is_already(planned: Plan) -> bool:
    output = planned.output
    try:
        return set(files(output)) == set(planned.outputs) and read_metadata(output).provenance == planned.provenance
    except InputError:
        return False


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns exit code 0 if the file is written and verified or already up to date, 1 if
    verification failed or no scheme fits, 2 for bad input.
    """
    flags = vars(_parser().parse_args(arguments))
    flags["sharding"] = Sharding(flags.pop("shards"), flags.pop("shard_bytes"), flags.pop("tensor_parallel"))
    prompt = flags.pop("run")
    try:
        path = export_llama(ExportOptions(**flags), ConsoleProgress())
        print(path)
    except (VerificationError, NothingFitsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if prompt is None else generate.main([str(path), "--prompt", prompt])


def _parser() -> argparse.ArgumentParser:
    description = "Exports a Llama checkpoint to one self-contained .pte file and verifies it."
    parser = command.parser("export.llama", description, __doc__)
    add = parser.add_argument
    _add_file_flags(parser)
    _add_graph_flags(parser)
    _add_part_flags(parser)
    _add_scheme_flags(parser)
    add(
        "--auto",
        action="store_true",
        help="choose the smallest scheme that keeps perplexity within --max-ppl-increase (default: 2%%)",
    )
    add_flags(parser)
    add("--run", metavar="PROMPT", help="after the export, continue this prompt as `llama-pte generate` does")
    add("--force", action="store_true", help="export again even if the output is up to date")
    add(
        "--no-cache",
        dest="cache",
        action="store_false",
        help=f"do not reuse results of earlier exports, which are kept in {default_folder()}",
    )
    return parser


def _add_file_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for input and output files."""
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        default=BUILT_IN,
        metavar="PATH",
        help="checkpoint: Hugging Face or Meta folder, GGUF, llama2.c .bin, or org/name on the Hugging Face hub "
        "(default: the built-in model)",
    )
    add_lora_flag(parser)
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer: SentencePiece, tiktoken or tokenizer.json, or `none` (default: the checkpoint's own)",
    )
    add(
        "--chat-template",
        metavar="NAME",
        help=f"chat template: {', '.join(NAMED)}, a Jinja file, or `none` (default: the checkpoint's own)",
    )
    add(
        "--output",
        type=Path,
        metavar="PATH",
        help="file to write, or folder for shards or slices (default: the checkpoint's name with .pte, .shards or "
        ".slices, in the current folder)",
    )
    hub.add_flags(parser)


def _add_graph_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the graph and its backend."""
    add = parser.add_argument
    add(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="maximum length of prompt and answer together, for which the KV cache is allocated "
        f"(default: the model's context, at most {DEFAULT_CONTEXT})",
    )
    add(
        "--prefill-chunk", type=int, metavar="N", help=f"prompt tokens processed in one step (default: {DEFAULT_CHUNK})"
    )
    refused = [name for name in BACKENDS if name not in lowering()]
    add(
        "--backend",
        default="xnnpack",
        metavar="NAME",
        help=f"ExecuTorch backend: {', '.join(lowering())} (default: %(default)s); unsupported: {', '.join(refused)}",
    )
    add(
        "--attention",
        metavar="FORM",
        help="fused: one operator that reads only the filled part of the KV cache; aten: plain operators over the "
        "whole cache (default: fused for xnnpack; aten for other backends, --no-kv-cache and mixtures of experts, "
        "unless in GGUF's types)",
    )
    add(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="texts that `llama-pte batch` extends at once (default: 1)",
    )
    add(
        "--no-kv-cache",
        dest="kv_cache",
        action="store_false",
        help="export without a KV cache: one method that takes the whole text at every step",
    )
    add("--hidden-states", action="store_true", help="also return the last block's normalised output")
    add(
        "--original-context",
        action="store_true",
        help="allow no more than the original context of a model whose context was extended",
    )


def _add_part_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that divide the model among files."""
    add = parser.add_argument
    add(
        "--shards",
        type=int,
        default=1,
        metavar="N",
        help="divide the model's blocks among N files in a folder (default: 1)",
    )
    add(
        "--shard-bytes",
        type=command.byte_count,
        metavar="SIZE",
        help="divide them among as few files as possible with at most this size of matrices each, such as 200MB",
    )
    add(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="divide every matrix among N files in a folder (default: 1)",
    )


def _add_scheme_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the storage of weights and caches."""
    add = parser.add_argument
    add(
        "--quantize",
        metavar="NAME",
        help=f"storage of weights: {', '.join(QUANTIZE)}; {AS_STORED} keeps a GGUF's own types (default: {AS_STORED} "
        "for a GGUF in types that the backend runs, otherwise fp32)",
    )
    add(
        "--group-size",
        type=int,
        metavar="N",
        help="number of 4-bit weights that share a scale: 32, 64 or 128 (default: 32)",
    )
    add(
        "--embedding-bits",
        type=int,
        metavar="N",
        help="bits of the embedding: 4 or 8 (default: 8 if anything is quantised)",
    )
    add(
        "--head-bits",
        type=int,
        metavar="N",
        help="bits of the head: 4 or 8 (default: as the other linear layers; 8 for mixed, and for a head that is then "
        "one table with the embedding)",
    )
    add(
        "--kv-dtype",
        default="fp32",
        help=f"format of the KV cache: {', '.join(KV_DTYPES)}; int8 has a scale per row (default: %(default)s)",
    )
    add(
        "--rounding",
        default="nearest",
        help=f"rounding of weights: {', '.join(ROUNDINGS)}; or {IMPORTANCE}, which favours inputs that are large on a "
        f"text; or {GPTQ}, which also compensates for errors (default: %(default)s)",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help=f"text whose first {TOKENS} tokens --rounding {IMPORTANCE} and {GPTQ} use; without --rounding, it means "
        f"{GPTQ} (default: a built-in text)",
    )
