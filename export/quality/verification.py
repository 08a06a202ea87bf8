"""Verification of a .pte against the eager model it was made from, and of the cost of quantisation."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.checkpoints.checkpoint import content_digest
from export.lowering.export_cache import ExportCache
from export.quality.fidelity import Fidelity, empty_text, judge, observed
from export.quality.perplexity import Gate, Quality, measure, most_tokens, random_windows, windows
from export.quality.report import write_report
from export.quality.weight_bytes import altered
from export.weights.scheme import Scheme
from export.weights.source import WeightSource
from model.errors import InputError
from runtime.engine import executorch
from runtime.engine.program import Program
from runtime.pte.metadata import Metadata

UNCACHED_TOKENS = 64
"""Number of tokens of the text that are given to a file without caches, which processes the whole text again for each
token.
"""


class VerificationError(Exception):
    """Raised when the exported program does not compute what was exported, or not accurately enough."""


@dataclass(frozen=True)
class Verdict:
    """Results of verifying a file.

    Attributes:
        metadata: metadata of the file.
        fidelity: differences between the file and the eager model.
        quality: cost of quantisation; None for float32.
        altered: parameters whose bytes in the file differ from those that the scheme gives for the checkpoint, and
            `EPSILON` of `export.quality.weight_bytes` if the epsilon of the norms differs.
    """

    metadata: Metadata
    fidelity: Fidelity
    quality: Quality | None
    altered: tuple[str, ...] = ()

    @property
    def failure(self) -> str | None:
        """Reason why the file does not pass, in a sentence; None if it passes."""
        if self.altered:
            more = f" and {len(self.altered) - 1} more" if len(self.altered) > 1 else ""
            return f"the file's weights differ from the checkpoint's: {self.altered[0]}{more}"
        if not self.fidelity.passed:
            return f"the program differs from the checkpoint: {self.fidelity}"
        return self.quality.failure if self.quality else None

    def __str__(self) -> str:
        return f"{self.fidelity}; {self.quality}" if self.quality else str(self.fidelity)

    @property
    def outcome(self) -> "Outcome":
        """The verdict in plain values."""
        return Outcome(str(self), self.failure, self._report() if self.quality else None)

    def _report(self) -> dict[str, Any]:
        scheme = Scheme.of(self.metadata)
        assert self.quality
        quality = asdict(self.quality) | {"worst": [loss.worst for loss in self.quality.worst]}
        quality["kl_limit"] = self.quality.kl_limit
        for name in ("quantised", "file", "file_float32"):
            quality[name]["increase"] = getattr(self.quality, name).increase
        return {
            "passed": self.failure is None,
            "failure": self.failure,
            "scheme": scheme.words,
            "provenance": self.metadata.provenance,
            "fidelity": asdict(self.fidelity),
            "quality": quality,
        }


@dataclass(frozen=True)
class Outcome:
    """A verdict in plain values.

    Attributes:
        summary: measured values, in words.
        failure: see `Verdict.failure`.
        report: content of the report on a quantised file, see `export.quality.report`, without the file's name and
            size; None for a float32 file.
    """

    summary: str
    failure: str | None
    report: dict[str, Any] | None

    def save(self, output: Path, size: int) -> Path:
        """Writes the report of a quantised file beside `output`, which has `size` bytes, and returns the path of the
        HTML page.
        """
        assert self.report, "a float32 file has no report"
        return write_report(output, self.report | {"file": {"name": output.name, "bytes": size}})


def verify_once(paths: Sequence[Path], source: WeightSource, gate: Gate, cache: ExportCache) -> Outcome:
    """Verifies an export, unless files with the same bytes have passed before, with the same runtime and on a processor
    of the same kind.

    The files contain the options and the digests of checkpoint and tokenizer. A failed verification is not cached.

    Raises:
        InputError: as in `verify`.
    """
    key = {
        "verified": [content_digest([path]) for path in paths],
        "runtime": content_digest(_runtime_files()),
        "text": gate.read(),
        "source": gate.text_name,
        "max_ppl_increase": gate.max_ppl_increase,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    if kept := cache.get(key):
        return Outcome(**kept)
    outcome = verify(paths, source, gate).outcome
    if outcome.failure is None:
        cache.put(key, vars(outcome))
    return outcome


def _runtime_files() -> list[Path]:
    """Returns the files of the runtime that runs the file: the engine's sources, and the compiled operators."""
    engine = Path(executorch.__file__).parent
    return [*sorted(engine.glob("*.py")), *sorted(engine.parent.glob("_operators*"))]


def verify(file: Path | Sequence[Path], source: WeightSource, gate: Gate | None = None) -> Verdict:
    """Compares the logits after each prompt and each decoded token; for a quantised file, also those of a text.

    The file is run and closed before the models are run, whose pieces are read one after another, to save memory.

    Args:
        file: the .pte, the folder of its shards or slices, or these files.
        source: source of the model from which the file was made.
        gate: text and limit for a quantised model; None for the built-in text and the scheme's limit.

    Raises:
        InputError: the file and the model have different dimensions, or the gate cannot be applied to the file.
    """
    program, gate = Program(file), gate or Gate()
    metadata = program.metadata
    check_same(metadata, source)
    limit = source.scheme.max_ppl_increase
    gate.check(limit is not None, program.tokenizer)
    found = observed(program)
    parts = _parts(program, gate) if limit else []
    followed = _followed(program, parts)
    text_name = gate.text_name if program.tokenizer else None
    del program
    fidelity = judge(source, found)
    del found
    changed = tuple(altered(file, source))
    if limit is None:
        return Verdict(metadata, fidelity, None, changed)
    limit = limit if gate.max_ppl_increase is None else gate.max_ppl_increase
    quality = measure(source, parts, followed, metadata.max_seq_len, text_name, limit)
    return Verdict(metadata, fidelity, quality, changed)


def check_same(metadata: Metadata, source: WeightSource) -> None:
    if metadata.config != source.config:
        raise InputError(
            f"the file was made from another model: {metadata.config} is not {source.config}; give the checkpoint it "
            "was made from"
        )


def _parts(program: Program, gate: Gate) -> list[list[int]]:
    """Returns the windows that the models are to predict, see `windows`; random tokens if there is no tokenizer."""
    metadata = program.metadata
    if program.tokenizer is None:
        return random_windows(metadata.config.vocab_size, metadata.max_seq_len)
    ids = program.tokenizer.encode(gate.read())
    return windows(ids, metadata.bos_id, metadata.max_seq_len, most_tokens(metadata.config))


def _followed(program: Program, texts: Sequence[Sequence[int]]) -> Tensor:
    """Runs the file on the input tokens of the texts, one at a time, and returns its logits after each, [N, V]."""
    given = [(token, not index) for text in texts for index, token in enumerate(text[:-1])]
    if not program.metadata.use_kv_cache:
        given = given[:UNCACHED_TOKENS]
    session, rows = empty_text(program), torch.empty(len(given), program.metadata.config.vocab_size)
    for row, (token, is_first) in zip(rows, given, strict=True):
        if is_first:
            session.reset()
        row.copy_(session.decode(token))
    return rows


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for `Gate.of`."""
    parser.add_argument(
        "--eval-text",
        type=Path,
        metavar="FILE",
        help="text to measure a quantised model on: its first 512 tokens, or 2048 for small models (default: a "
        "built-in text)",
    )
    parser.add_argument(
        "--max-ppl-increase",
        type=_share,
        metavar="SHARE",
        help="maximum increase of perplexity by quantising, such as 2%% or 0.02 (default: 10%% at 4 bits, 5%% at "
        "8 bits)",
    )


def _share(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is invalid; give a share such as 2% or 0.02") from None
