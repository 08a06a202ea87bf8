"""Selection of schemes by measuring the model: which blocks need more bits, and the smallest scheme that passes."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from export.planning.plan import Plan
from export.quality.eager import packed
from export.quality.layer_errors import Loss, measure_layer_errors
from export.quality.perplexity import Comparison, Gate, Rows, most_tokens, percent, windows
from export.weights.formats.integer import BYTE, Integer
from export.weights.scheme import SCHEMES, Scheme, embedding_size, is_shared, matrix_sizes
from export.weights.source import WeightSource
from model.config import ModelConfig
from model.errors import InputError

MIXED = {"mixed": 0.25}
"""Schemes of `--quantize` that depend on the model, with the share of the blocks, those with the greatest loss, that is
kept at 8 bits.
"""


DEFAULT_BUDGET = 0.02
"""Default of `--auto` for the largest relative increase of perplexity."""


class NothingFitsError(Exception):
    """Raised when no scheme keeps the increase of perplexity within the limit."""


@dataclass(frozen=True)
class Candidate:
    """A scheme to try.

    Attributes:
        quantize: its name in SCHEMES.
        scheme: the scheme.
        careful: share of the blocks that is kept at 8 bits.
    """

    quantize: str
    scheme: Scheme
    careful: float = 0.0


def candidates(rounding: str, kv_dtype: str = "float32") -> list[Candidate]:
    """Returns the schemes to try, each with at least the bits of the one before."""
    four = [Integer(4, size) for size in (128, 64, 32)]
    finest = four[-1]
    schemes = [Candidate("8da4w", Scheme(form, form, form)) for form in four]
    schemes += [Candidate("8da4w", Scheme(finest, head, BYTE)) for head in (finest, BYTE)]
    schemes += [Candidate("mixed", Scheme(finest, BYTE, BYTE), share) for share in (0.25, 0.5)]
    schemes += [Candidate("8da8w", SCHEMES["8da8w"])]
    return [
        replace(candidate, scheme=replace(candidate.scheme, rounding=rounding, kv_dtype=kv_dtype))
        for candidate in schemes
    ]


def stored_bytes(config: ModelConfig, scheme: Scheme) -> int:
    """Returns the size in bytes of all matrices in a file."""
    embedding = 0 if is_shared(config, scheme) else embedding_size(config, scheme)
    return sum(matrix_sizes(config, scheme).values()) + embedding


def measure_scheme(
    source: WeightSource, texts: Sequence[Sequence[int]], max_seq_len: int
) -> tuple[Comparison, tuple[Loss, ...]]:
    """Compares the quantised model's predictions of texts with float32's, and returns the comparison and the loss of
    each piece. Matrices to be calibrated are rounded without calibration.
    """
    source = source.with_scheme(replace(source.scheme, rounding=source.scheme.plain_rounding))
    targets, rows = torch.tensor([token for text in texts for token in text[1:]]), list[Rows]()

    def take(start: int, exact: Tensor, found: Tensor) -> None:
        rows.append(Rows.of(exact, found, targets[start : start + len(exact)]))

    losses = measure_layer_errors(source, packed(source.config, [text[:-1] for text in texts], max_seq_len), take)
    return Rows.concatenate(rows).comparison(is_text=True), losses


def most_sensitive(losses: Collection[Loss], share: float) -> tuple[int, ...]:
    """Returns the given share of the blocks, at least one, with the largest own error."""
    blocks = {int(loss.name.removeprefix("layers.")): loss.own for loss in losses if loss.name.startswith("layers.")}
    ranked = sorted(blocks, key=lambda layer: -blocks[layer])
    return tuple(sorted(ranked[: math.ceil(share * len(blocks))]))


def with_careful(planned: Plan, share: float, texts: Sequence[Sequence[int]]) -> Plan:
    """Returns the plan with a share of the blocks at 8 bits: those with the largest own error under the plan's
    scheme.
    """
    options = planned.provenance["options"]
    _, losses = measure_scheme(planned.source, texts, options["max_seq_len"])
    scheme, layers = planned.source.scheme, most_sensitive(losses, share)
    scheme = replace(scheme, others={f"layers.{layer}": scheme.linear.fallback for layer in layers})
    return planned.with_scheme(options["quantize"], scheme)


def smallest(planned: Plan, texts: Sequence[Sequence[int]], budget: float, note: Callable[[str], None]) -> Plan:
    """Returns the plan with the smallest file that keeps the increase of perplexity within the budget.

    Args:
        texts: texts on which to measure.
        budget: largest relative increase of perplexity.
        note: receives a message for each scheme that is tried.

    Raises:
        NothingFitsError: no scheme stays within the budget.
    """
    config, sized = planned.source.config, list[tuple[int, int, Plan]]()
    asked = planned.source.scheme
    for number, candidate in enumerate(candidates(asked.rounding, asked.kv_dtype)):
        tried = planned.with_scheme(candidate.quantize, candidate.scheme)
        if candidate.careful:
            tried = with_careful(tried, candidate.careful, texts)
        sized.append((stored_bytes(config, tried.source.scheme), number, tried))
    for size, _, tried in sorted(sized, key=lambda entry: entry[:2]):
        found, _ = measure_scheme(tried.source, texts, planned.provenance["options"]["max_seq_len"])
        scheme = tried.source.scheme
        note(
            f"linear {scheme.linear}, head {scheme.head}, embedding {scheme.embedding}, blocks at 8 bits: "
            f"{len(scheme.others)}: {size / 1e6:.1f} MB, perplexity {found.increase:+.2%}, mean KL {found.mean_kl:.2g}"
        )
        if found.within(budget):
            return tried
    raise NothingFitsError(
        f"no scheme up to 8 bits keeps perplexity within {percent(budget)} of float32's; allow more with "
        "--max-ppl-increase, or export with --quantize fp32"
    )


def choose_scheme(planned: Plan, gate: Gate, auto: bool, note: Callable[[str], None]) -> Plan:
    """Returns the plan with a scheme selected by measuring, for `--auto` and the schemes in MIXED; otherwise unchanged.

    Raises:
        InputError: there is no tokenizer for the text to measure on.
        NothingFitsError: as in `smallest`.
    """
    quantize, max_seq_len = (planned.provenance["options"][name] for name in ("quantize", "max_seq_len"))
    if not auto and quantize not in MIXED:
        return planned
    if planned.tokenizer is None:
        flag = "--auto" if auto else f"--quantize {quantize}"
        raise InputError(f"{flag} needs a tokenizer, because it measures on a text; give --tokenizer FILE")
    ids, most = planned.tokenizer.encode(gate.read()), most_tokens(planned.source.config)
    texts = windows(ids, planned.provenance["bos_id"], max_seq_len, most)
    if auto:
        return smallest(planned, texts, gate.max_ppl_increase or 0.0, note)
    return with_careful(planned, MIXED[quantize], texts)
