"""The export command: a Llama checkpoint becomes one self-contained .pte.

python -m export.llama --max-seq-len 512
python -m export.llama --checkpoint path/to/Llama-3.2-1B --max-seq-len 2048 --output llama.pte
python -m export.llama --checkpoint stories260K.bin --tokenizer tok512.model
"""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from export.emit import emit, replacing
from export.inspect import cache_bytes
from export.lower import BACKENDS, Lowered, lower
from export.metadata import FORMAT_VERSION, NO_TOKENIZER, Metadata
from export.trace import GraphOptions, Traced, trace
from export.verify import LIMITS, verify
from model.checkpoint import BUILT_IN, Checkpoint, open_checkpoint
from model.errors import InputError, run_command
from preproc import mask, rope
from preproc.tokenizer import Tokenizer, open_tokenizer
from runtime.program import Program, read_metadata

DEFAULT_CONTEXT = 2048
"""The longest max-seq-len that is chosen without being asked for: caches grow with it."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how.

    Attributes:
        checkpoint: a file or folder of any layout that `model.checkpoint` knows.
        tokenizer: a tokenizer file; None takes the checkpoint's own, "none" exports without one.
        output: the .pte to write; None names it after the checkpoint, in the current folder.
        max_seq_len: capacity of the KV cache; None takes the checkpoint's context, at most DEFAULT_CONTEXT.
        prefill_chunk: tokens that prefill takes at once; None takes 64, or max_seq_len where that is less.
        backend: one of `export.lower.BACKENDS`.
        dtype: how weights are stored, one of `export.verify.LIMITS`.
        force: export even if the output is already what would be made.
    """

    checkpoint: Path = BUILT_IN
    tokenizer: Path | None = None
    output: Path | None = None
    max_seq_len: int | None = None
    prefill_chunk: int | None = None
    backend: str = "xnnpack"
    dtype: str = "fp32"
    force: bool = False

    def __post_init__(self) -> None:
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise InputError(f"--max-seq-len {self.max_seq_len} is impossible; give 1 or more")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise InputError(f"--prefill-chunk {self.prefill_chunk} is impossible; give 1 or more")
        for flag, value, known in (("backend", self.backend, BACKENDS), ("dtype", self.dtype, LIMITS)):
            if value not in known:
                raise InputError(f"--{flag} {value} is unknown; choose from {', '.join(known)}")


class VerificationError(Exception):
    """The exported program does not compute what the checkpoint does; nothing was written."""


class Progress:
    """Hears of each stage; this one keeps silent."""

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Wraps one stage; what it appends to the list yielded is its result in words."""
        yield []

    def note(self, line: str) -> None:
        """Something a person should know."""


class ConsoleProgress(Progress):
    """Prints a line per stage: name, seconds, result; on a terminal, a spinner while it runs."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        start, result = time.monotonic(), list[str]()
        with self._console.status(f"{name} ..."):
            yield result
        self._console.print(f"{name:8}{time.monotonic() - start:7.1f} s  {'; '.join(result)}", markup=False)

    def note(self, line: str) -> None:
        self._console.print(line, markup=False)


def export_llama(options: ExportOptions, progress: Progress | None = None) -> Path:
    """Runs all stages and returns the path of the file, which is complete and verified, or as it was before.

    Raises:
        InputError: checkpoint, tokenizer or options cannot be used.
        VerificationError: the program's logits differ from the eager model's by more than the format's limits.
    """
    progress = progress or Progress()
    with progress.stage("open") as result:
        checkpoint = open_checkpoint(options.checkpoint)
        tokenizer = _tokenizer(checkpoint, options)
        max_seq_len, chunk = _limits(checkpoint, options)
        provenance = _provenance(checkpoint, tokenizer, options, (max_seq_len, chunk))
        config = checkpoint.config
        result.append(
            f"{checkpoint.layout}, {config.n_layers} layers, dim {config.dim}, vocabulary {config.vocab_size}"
        )
    if max_seq_len > config.context:
        progress.note(f"warning: --max-seq-len {max_seq_len} is beyond the {config.context} the model was trained for")

    output = options.output or _default_output(options.checkpoint)
    if output.resolve() in {file.resolve() for file in (*checkpoint.files, options.tokenizer or output.parent)}:
        raise InputError(f"--output {output} is one of the files to read; give another name")
    if not options.force and _is_already(output, provenance):
        progress.note(f"{output} is already this export; --force makes it again")
        return output

    with replacing(output) as temporary:
        with progress.stage("trace") as result:
            model = checkpoint.build()
            traced = trace(model, GraphOptions(max_seq_len, chunk))
            result.extend(f"{method.name} takes {_tokens(method.max_length)}" for method in traced.methods)
        with progress.stage("lower") as result:
            lowered = lower(traced, options.backend)
            outside = ", ".join(lowered.requirements.operators)
            result.append(f"{options.backend}, {lowered.delegates} delegates; kernels outside: {outside}")
        with progress.stage("emit") as result:
            emit(lowered, _metadata(checkpoint, tokenizer, traced, lowered, provenance), temporary)
            result.append(f"{temporary.stat().st_size / 1e6:.1f} MB")
        with progress.stage("verify") as result:
            report = verify(Program(temporary), model)
            result.append(str(report))
        if not report.passed:
            raise VerificationError(f"the program differs from the checkpoint: {report}; {output} was not written")
    return output


def _metadata(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, traced: Traced, lowered: Lowered, provenance: dict[str, Any]
) -> Metadata:
    config, max_seq_len = checkpoint.config, provenance["options"]["max_seq_len"]
    cos, sin = rope.tables(config, max_seq_len)
    slopes = mask.alibi_slopes(config) if config.positions == "alibi" else torch.zeros(config.n_heads)
    return Metadata(
        config=config,
        max_seq_len=max_seq_len,
        batch_size=1,
        bos_id=provenance["bos_id"],
        stop_ids=tuple(provenance["stop_ids"]),
        methods=traced.methods,
        requirements=lowered.requirements,
        provenance=provenance,
        rope_cos=cos,
        rope_sin=sin,
        rope_inverse_frequencies=rope.inverse_frequencies(config, max_seq_len),
        alibi_slopes=slopes,
        tokenizer_kind=tokenizer.kind if tokenizer else NO_TOKENIZER,
        tokenizer=tokenizer.data if tokenizer else b"",
    )


def _tokenizer(checkpoint: Checkpoint, options: ExportOptions) -> Tokenizer | None:
    path = options.tokenizer or checkpoint.tokenizer
    if path is None:
        raise InputError(
            f"{options.checkpoint} comes with no tokenizer; give --tokenizer FILE, or `none` to go without"
        )
    if str(path) == NO_TOKENIZER:
        return None
    tokenizer = open_tokenizer(path)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise InputError(
            f"tokenizer {path} has {tokenizer.vocab_size} ids where the model has {checkpoint.config.vocab_size}; "
            "give the one the model was trained with"
        )
    return tokenizer


def _limits(checkpoint: Checkpoint, options: ExportOptions) -> tuple[int, int]:
    max_seq_len = options.max_seq_len or min(checkpoint.config.context, DEFAULT_CONTEXT)
    chunk = options.prefill_chunk or min(64, max_seq_len)
    if chunk > max_seq_len:
        raise InputError(f"--prefill-chunk {chunk} is larger than --max-seq-len {max_seq_len}; give at most that")
    need, have = cache_bytes(checkpoint.config, max_seq_len), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise InputError(
            f"--max-seq-len {max_seq_len} needs KV caches of {need / 1e9:.1f} GB, but this machine has "
            f"{have / 1e9:.1f} GB; give less"
        )
    return max_seq_len, chunk


def _default_output(checkpoint: Path) -> Path:
    """The checkpoint's name; a folder's may hold dots of its own, as in Llama-3.2-1B."""
    path = Path(os.path.abspath(checkpoint))  # not resolved: a link's name says more than its target's
    return Path(f"{path.name if path.is_dir() else path.stem}.pte")


def _provenance(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, options: ExportOptions, limits: tuple[int, int]
) -> dict[str, Any]:
    """All that decides what is written: files made from equal provenance are equal."""
    max_seq_len, chunk = limits
    return {
        "format_version": FORMAT_VERSION,
        "checkpoint": {"layout": checkpoint.layout, "xxh3_128": checkpoint.digest()},
        "bos_id": checkpoint.bos_id if checkpoint.bos_id is not None or tokenizer is None else tokenizer.bos_id,
        "stop_ids": list(checkpoint.stop_ids or (tokenizer.stop_ids if tokenizer else ())),
        "tokenizer": {"sha256": hashlib.sha256(tokenizer.data).hexdigest()} if tokenizer else None,
        "options": {
            "max_seq_len": max_seq_len,
            "prefill_chunk": chunk,
            "backend": options.backend,
            "dtype": options.dtype,
        },
        "versions": {name: version(name) for name in ("llama-pte", "torch", "executorch", "torchao")},
        "source": {"sha256": _source_digest()},
    }


def _source_digest() -> str:
    """Of our own code: a file made by other code is another export, whatever its version number says."""
    digest = hashlib.sha256()
    for package in ("model", "preproc", "export"):
        for file in sorted((Path(__file__).parent.parent / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _is_already(output: Path, provenance: dict[str, Any]) -> bool:
    try:
        return output.is_file() and read_metadata(output).provenance == provenance
    except InputError:
        return False


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def main(arguments: list[str] | None = None) -> int:
    """The command: exit code 0 when the file is there and verified, 1 when verification failed, 2 for bad input."""
    options = ExportOptions(**vars(_parser().parse_args(arguments)))
    try:
        print(export_llama(options, ConsoleProgress()))
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m export.llama",
        description="Exports a Llama checkpoint as one self-contained .pte, and verifies it.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        default=BUILT_IN,
        metavar="PATH",
        help="Hugging Face or Meta folder, GGUF, or llama2.c .bin (default: the built-in model)",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="SentencePiece, tiktoken or tokenizer.json; `none` for no tokenizer (default: the checkpoint's own)",
    )
    add("--output", type=Path, metavar="FILE", help="default: the checkpoint's name with .pte, in this folder")
    add(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="positions of prompt and answer together; the KV cache is allocated for all of them "
        f"(default: the model's context, at most {DEFAULT_CONTEXT})",
    )
    add("--prefill-chunk", type=int, metavar="N", help="prompt tokens taken at once (default: 64)")
    add("--backend", default="xnnpack", help=f"{' or '.join(BACKENDS)} (default: %(default)s)")
    add("--dtype", default="fp32", help=f"{' or '.join(LIMITS)} (default: %(default)s)")
    add("--force", action="store_true", help="export again even if the output is up to date")
    return parser


if __name__ == "__main__":
    run_command(main)
