"""verify: the .pte against the eager model it was made from, through prefill and decode.

The reference sees each whole sequence in one pass, without caches, so that a fault in a cache, a mask or a rotary slice
shows as well as one in the graph or a weight.

    python -m export.verify tiny.pte
    python -m export.verify llama.pte --checkpoint path/to/Llama-3.2-1B
"""

from model import command

if __name__ == "__main__":
    command.start("export.verify")

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from export.quantize import SCHEMES
from export.recipe import Recipe
from export.trace import step
from model.checkpoint import BUILT_IN, open_checkpoint
from model.errors import InputError
from model.hub import fetched, is_hub_name
from model.model import Llama
from preproc.mask import HIDDEN
from preproc.positions import Positions, names
from runtime.program import Program, read_metadata
from runtime.session import Session

PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
)
DECODED = 16
"""Tokens decoded greedily after each prompt."""


class VerificationError(Exception):
    """The exported program does not compute what was exported; nothing was written."""


@dataclass(frozen=True)
class Limits:
    """The largest differences that still pass."""

    max_abs: float
    kl: float


LIMITS = {"fp32": Limits(max_abs=1e-4, kl=1e-6), "8da4w": Limits(max_abs=2.0, kl=2e-2)}
"""What each scheme is allowed: the reference is quantised as well."""


@dataclass(frozen=True)
class Report:
    """Differences between the file's logits and the eager model's.

    Attributes:
        positions: how many rows of logits were compared.
        max_abs: largest absolute difference of a logit.
        mse: mean squared difference.
        kl: largest KL divergence of a row, KL(eager || file), in nats.
        greedy_agreement: share of the rows whose most likely token is the same.
        limits: what was allowed.
    """

    positions: int
    max_abs: float
    mse: float
    kl: float
    greedy_agreement: float
    limits: Limits

    @property
    def passed(self) -> bool:
        """Whether every difference is a number and within the limits."""
        return self.max_abs <= self.limits.max_abs and self.kl <= self.limits.kl

    def __str__(self) -> str:
        return (
            f"max abs {self.max_abs:.1e} (limit {self.limits.max_abs:.0e}), KL {self.kl:.1e} (limit "
            f"{self.limits.kl:.0e}), MSE {self.mse:.1e}, greedy {self.greedy_agreement:.1%} of {self.positions} rows"
        )


def verify(file: Path, model: Llama) -> Report:
    """Compares the rows after each prompt and each decoded token.

    The file is run first and closed before the model, whose pieces may be read one after another, takes memory.

    Raises:
        InputError: file and model do not have the same dimensions.
    """
    program = Program(file)
    metadata = program.metadata
    if metadata.config != model.config:
        raise InputError(f"the file was made from another model: {metadata.config} is not {model.config}")
    texts, found = _played(program)
    del program
    expected = reference(model, texts, [len(rows) for rows in found], metadata.max_seq_len)
    return compare(found, expected, LIMITS[metadata.provenance["options"]["quantize"]])


def _played(program: Program) -> tuple[list[list[int]], list[Tensor]]:
    """Each prompt with what the file makes of it, and the logits [rows, V] after the prompt and each token of that."""
    texts, found, session = [], [], Session(program)
    for prompt in _prompts(program):
        session.reset()
        rows, text = [session.prefill(prompt)], list(prompt)
        while len(rows) <= DECODED and session.position < session.capacity:
            text.append(int(rows[-1].argmax()))
            rows.append(session.decode(text[-1]))
        texts.append(text)
        found.append(torch.stack(rows))
    return texts, found


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], limits: Limits) -> Report:
    """Measures logits, each [N, V], against the reference's. A NaN on either side stays NaN, and fails."""
    max_abs, squares, kl, agreed, positions = 0.0, 0.0, 0.0, 0.0, 0
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = ours.double(), theirs.double()
        difference = ours - theirs
        p, q = F.log_softmax(theirs, dim=-1), F.log_softmax(ours, dim=-1)
        max_abs = _larger(max_abs, difference.abs().max())
        kl = _larger(kl, (p.exp() * (p - q)).sum(dim=-1).max())
        squares += float(difference.square().mean(dim=-1).sum())
        agreed += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        positions += len(ours)
    return Report(positions, max_abs, squares / positions, kl, agreed / positions, limits)


def _larger(a: float, b: Tensor) -> float:
    return float(torch.maximum(torch.tensor(a, dtype=torch.float64), b))  # a NaN wins


@torch.no_grad()
def reference(
    model: Llama, texts: Sequence[Sequence[int]], rows: Sequence[int] | None = None, max_seq_len: int | None = None
) -> list[Tensor]:
    """The eager model's logits of texts, without caches: [len(text), V] each, or only the last `rows` of them.

    All texts are one sequence in which none sees another, so that each piece of the model is run once.

    Args:
        max_seq_len: the length that the rotary tables are made for; None for the longest text's.
    """
    lengths = [len(text) for text in texts]
    total = sum(lengths)
    positions = Positions.of(model.config, max_seq_len or max(lengths))
    inputs = {"tokens": torch.tensor([[token for text in texts for token in text]])}
    for name in names(model.config):
        made = [positions.make(name, 0, length, capacity=0) for length in lengths]
        inputs[name] = _apart(made) if name.endswith("mask") else torch.cat(made, dim=1)
    wanted = [range(end - (count or length), end) for end, length, count in _spans(lengths, rows)]
    inputs["select"] = torch.eye(total)[[row for span in wanted for row in span]]
    return list(torch.split(step(model, inputs)["logits"], [len(span) for span in wanted]))


def _spans(lengths: Sequence[int], rows: Sequence[int] | None) -> Iterator[tuple[int, int, int]]:
    end = 0
    for length, count in zip(lengths, rows or [0] * len(lengths), strict=True):
        end += length
        yield end, length, count


def _apart(masks: Sequence[Tensor]) -> Tensor:
    """Masks [1 or H, L, L] along the diagonal of one in which they do not see each other."""
    total, start = sum(mask.shape[-1] for mask in masks), 0
    joined = torch.full((len(masks[0]), total, total), HIDDEN)
    for mask in masks:
        end = start + mask.shape[-1]
        joined[:, start:end, start:end] = mask
        start = end
    return joined


def _prompts(program: Program) -> list[list[int]]:
    """Texts where there is a tokenizer, and random ids of lengths around the chunk's and, if short, the context's."""
    metadata = program.metadata
    chunk, capacity = max(method.max_length for method in metadata.methods), metadata.max_seq_len
    lengths = {1, chunk - 1, chunk, chunk + 1, 2 * chunk + 3} | (
        {capacity - 8, capacity} if capacity <= 1024 else set()
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(metadata.config.vocab_size, (length,), generator=generator).tolist()
        for length in sorted(lengths)
        if 0 < length <= capacity
    ]
    if program.tokenizer:
        start = [] if metadata.bos_id is None else [metadata.bos_id]
        texts = (start + program.tokenizer.encode(text) for text in PROMPTS)
        prompts += [tokens[:capacity] for tokens in texts if tokens]
    return prompts


def main(arguments: list[str] | None = None) -> int:
    """The command: exit code 0 when the file passes, 1 when it does not, 2 for bad input."""
    parser = command.parser("export.verify", "Checks a .pte against its checkpoint.", __doc__)
    parser.add_argument("file", type=Path, help="the .pte")
    parser.add_argument("--checkpoint", type=Path, default=BUILT_IN, help="default: the built-in model")
    options = parser.parse_args(arguments)
    scheme = SCHEMES[read_metadata(options.file).provenance["options"]["quantize"]]
    path = options.checkpoint
    checkpoint = open_checkpoint(fetched(path) if is_hub_name(path) else path)
    report = verify(options.file, Recipe(checkpoint.config, checkpoint.weights, scheme).streamed())
    print(f"{options.file}: {report}: {'passed' if report.passed else 'FAILED'}")
    return 0 if report.passed else 1
