"""verify: the .pte against the eager model it was made from, through prefill and decode.

The reference sees each whole sequence in one pass, without caches, so that a fault in a cache, a mask or a rotary slice
shows as well as one in the graph or a weight.

    python -m export.verify tiny.pte
    python -m export.verify llama.pte --checkpoint path/to/Llama-3.2-1B
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from export.trace import step
from model.checkpoint import BUILT_IN, open_checkpoint
from model.errors import InputError, run_command
from model.model import Llama
from preproc.positions import Positions, names
from runtime.program import Program
from runtime.session import Session

PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a: int, b: int) -> int:\n    return a + b\n",
)
DECODED = 16
"""Tokens decoded greedily after each prompt."""


@dataclass(frozen=True)
class Limits:
    """The largest differences that still pass."""

    max_abs: float
    kl: float


LIMITS = {"fp32": Limits(max_abs=1e-4, kl=1e-6)}
"""What each weight format is allowed."""


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


def verify(program: Program, model: Llama) -> Report:
    """Compares the rows after each prompt and each decoded token.

    Raises:
        InputError: file and model do not have the same dimensions.
    """
    metadata = program.metadata
    if metadata.config != model.config:
        raise InputError(f"the file was made from another model: {metadata.config} is not {model.config}")
    found, expected = [], []
    for prompt in _prompts(program):
        session = Session(program)
        rows, tokens = [session.prefill(prompt)], list(prompt)
        while len(rows) <= DECODED and session.position < session.capacity:
            tokens.append(int(rows[-1].argmax()))
            rows.append(session.decode(tokens[-1]))
        found.append(torch.stack(rows))
        expected.append(reference(model, tokens, len(rows)))
    return compare(torch.cat(found), torch.cat(expected), LIMITS[metadata.provenance["options"]["dtype"]])


def compare(found: Tensor, expected: Tensor, limits: Limits) -> Report:
    """Measures logits [N, V] against the reference's. A NaN on either side stays NaN, and fails."""
    found, expected = found.double(), expected.double()
    difference = found - expected
    p, q = F.log_softmax(expected, dim=-1), F.log_softmax(found, dim=-1)
    return Report(
        positions=len(found),
        max_abs=float(difference.abs().max()),
        mse=float(difference.square().mean()),
        kl=float((p.exp() * (p - q)).sum(dim=-1).max()),
        greedy_agreement=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        limits=limits,
    )


@torch.no_grad()
def reference(model: Llama, tokens: list[int], rows: int | None = None) -> Tensor:
    """The eager model's logits of one sequence, in one pass without caches: [L, V], or only the last `rows` of them."""
    length = len(tokens)
    positions = Positions.of(model.config, length)
    inputs = {name: positions.make(name, 0, length, capacity=0) for name in names(model.config)}
    inputs |= {"tokens": torch.tensor([tokens]), "select": torch.eye(length)[-(rows or length) :]}
    return step(model, inputs)["logits"]


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
    parser = argparse.ArgumentParser(
        "python -m export.verify",
        description="Checks a .pte against its checkpoint.",
        epilog="\n".join(line for line in (__doc__ or "").splitlines() if line.startswith("    python")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="the .pte")
    parser.add_argument("--checkpoint", type=Path, default=BUILT_IN, help="default: the built-in model")
    options = parser.parse_args(arguments)
    report = verify(Program(options.file), open_checkpoint(options.checkpoint).build())
    print(f"{options.file}: {report}: {'passed' if report.passed else 'FAILED'}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    run_command(main)
