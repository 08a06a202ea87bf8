"""verify(file, source): the .pte against the eager model it was made from, and what quantising costs."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from export.lowering.export_cache import ExportCache
from export.quality.fidelity import Fidelity, empty_text, judge, observed
from export.quality.perplexity import Gate, Quality, measure, most_tokens, random_windows, windows
from export.quality.report import write_report
from export.quality.weight_bytes import altered
from export.weights.scheme import Scheme
from export.weights.source import WeightSource
from model.errors import InputError
from runtime.engine.program import Program
from runtime.pte.metadata import Metadata

UNCACHED_TOKENS = 64
"""Tokens of the text that a file without caches is given, which takes the whole text anew for each."""


class VerificationError(Exception):
    """The exported program does not compute what was exported, or not well enough; nothing was written."""


MAX_PPL_INCREASE = {8: 0.05, 4: 0.1}
"""See `Quality.limit`; by `Scheme.fewest_bits`. A sound model of 135 million parameters loses 2 to 3% by 8 bits, as its
activations are rounded by token; one that is ruined loses tens of percents.
"""


@dataclass(frozen=True)
class Verdict:
    """What was found of a file.

    Attributes:
        metadata: what the file carries.
        fidelity: whether it computes what was exported.
        quality: what quantising cost; None for float32.
        altered: the parameters whose bytes in the file are not those that the scheme makes of the checkpoint's, and the
            epsilon if it is another.
    """

    metadata: Metadata
    fidelity: Fidelity
    quality: Quality | None
    altered: tuple[str, ...] = ()

    @property
    def failure(self) -> str | None:
        """Why the file does not pass, in a sentence; None if it does."""
        if self.altered:
            more = f" and {len(self.altered) - 1} more" if len(self.altered) > 1 else ""
            return f"the file holds other numbers than the checkpoint: {self.altered[0]}{more}"
        if not self.fidelity.passed:
            return f"the program differs from the checkpoint: {self.fidelity}"
        return self.quality.failure if self.quality else None

    def __str__(self) -> str:
        return f"{self.fidelity}; {self.quality}" if self.quality else str(self.fidelity)

    @property
    def outcome(self) -> "Outcome":
        """What is told and kept of it."""
        return Outcome(str(self), self.failure, self._report() if self.quality else None)

    def _report(self) -> dict[str, Any]:
        scheme = Scheme.parse(self.metadata.provenance["options"]["scheme"])
        assert self.quality
        quality = asdict(self.quality) | {"worst": [loss.worst for loss in self.quality.worst]}
        quality["kl_limit"] = self.quality.kl_limit
        for name in ("quantised", "file", "file_float32"):
            quality[name]["increase"] = getattr(self.quality, name).increase
        return {
            "passed": self.failure is None,
            "failure": self.failure,
            "scheme": {name: str(form) for name, form in vars(scheme).items()},
            "provenance": self.metadata.provenance,
            "fidelity": asdict(self.fidelity),
            "quality": quality,
        }


@dataclass(frozen=True)
class Outcome:
    """A verdict in plain values.

    Attributes:
        summary: the numbers, in words.
        failure: see `Verdict.failure`.
        report: what `export.quality.report` writes of a quantised file, but for the file's name and size.
    """

    summary: str
    failure: str | None
    report: dict[str, Any] | None

    def save(self, output: Path, size: int) -> Path:
        """Writes the report of a quantised file beside `output`, which has `size` bytes, and returns the page."""
        assert self.report, "a float32 file has no report"
        return write_report(output, self.report | {"file": {"name": output.name, "bytes": size}})


def verify_once(paths: Sequence[Path], source: WeightSource, gate: Gate, cache: ExportCache) -> Outcome:
    """Verifies an export, unless files of the same bytes have passed before, on a processor of this kind.

    Files have the digests of checkpoint and tokenizer in them, and the options. What failed is verified again.

    Raises:
        InputError: as `verify` does.
    """
    key = {
        "verified": [_digest(path) for path in paths],
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


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(1 << 24):
            state.update(data)
    return state.hexdigest()


def verify(file: Path | Sequence[Path], source: WeightSource, gate: Gate | None = None) -> Verdict:
    """Compares the rows after each prompt and each decoded token, and of a quantised file those of a text.

    The file is run first and closed before the models, whose pieces are read one after another, take memory.

    Args:
        file: the .pte, the folder of its shards, or these.
        source: what the file was made from.
        gate: what a quantised model is held to; None for the built-in text and the scheme's limit.

    Raises:
        InputError: file and model do not have the same dimensions, or the gate asks for what cannot be measured.
    """
    program, gate = Program(file), gate or Gate()
    metadata = program.metadata
    check_same(metadata, source)
    bits = source.scheme.fewest_bits
    gate.check(bits is not None, program.tokenizer)
    found = observed(program)
    parts = _parts(program, gate) if bits else []
    followed = _followed(program, parts)
    text_name = gate.text_name if program.tokenizer else None
    del program
    fidelity = judge(source, found)
    del found
    changed = tuple(altered(file, source))
    if bits is None:
        return Verdict(metadata, fidelity, None, changed)
    limit = MAX_PPL_INCREASE[bits] if gate.max_ppl_increase is None else gate.max_ppl_increase
    quality = measure(source, parts, followed, metadata.max_seq_len, text_name, limit)
    return Verdict(metadata, fidelity, quality, changed)


def check_same(metadata: Metadata, source: WeightSource) -> None:
    if metadata.config != source.config:
        raise InputError(f"the file was made from another model: {metadata.config} is not {source.config}")


def _parts(program: Program, gate: Gate) -> list[list[int]]:
    """What the models are to predict, see `windows`; random tokens where there is no tokenizer."""
    metadata = program.metadata
    if program.tokenizer is None:
        return random_windows(metadata.config.vocab_size, metadata.max_seq_len)
    ids = program.tokenizer.encode(gate.read())
    return windows(ids, metadata.bos_id, metadata.max_seq_len, most_tokens(metadata.config))


def _followed(program: Program, texts: Sequence[Sequence[int]]) -> Tensor:
    """The file's logits behind each token that it is given of the texts, one by one, [N, V]."""
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
    """The flags of `Gate.of`."""
    parser.add_argument(
        "--eval-text",
        type=Path,
        metavar="FILE",
        help="what a quantised model is measured on: the first 512 tokens, for small models 2048 (default: a text of "
        "the project's own)",
    )
    parser.add_argument(
        "--max-ppl-increase",
        type=_share,
        metavar="SHARE",
        help="by how much quantising may increase the perplexity, such as 2%% or 0.02 (default: the scheme's own)",
    )


def _share(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no share; give one such as 2% or 0.02") from None
