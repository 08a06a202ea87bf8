"""Runs of the eager model on whole texts, in one pass and without caches."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from export.lowering.trace import step
from model.config import ModelConfig
from model.model import Llama
from preproc.mask import HIDDEN
from preproc.position_inputs import Positions, names
from runtime.pte.metadata import ROWS, role_and_layer


class Expected(NamedTuple):
    """Results of the eager model for texts.

    Attributes:
        logits: one tensor [rows, V] per text.
        rows: keys and values of each text, by their names in a step's results: k_rows.3 -> [K, len(text), Dh].
    """

    logits: list[Tensor]
    rows: list[dict[str, Tensor]]


def reference(
    model: Llama, texts: Sequence[Sequence[int]], rows: Sequence[int] | None = None, max_seq_len: int | None = None
) -> list[Tensor]:
    """Returns the eager model's logits of texts, computed without caches: [len(text), V] each, or only the last `rows`
    of them.

    Args:
        rows: number of last rows to return for each text; None for all.
        max_seq_len: length for which the rotary tables are made; None for the length of the longest text.
    """
    return expected_of(model, texts, rows, max_seq_len).logits


@torch.no_grad()
def expected_of(
    model: Llama, texts: Sequence[Sequence[int]], rows: Sequence[int] | None = None, max_seq_len: int | None = None
) -> Expected:
    """Returns the eager model's logits, and each block's keys and values. The arguments are those of `reference`."""
    lengths = [len(text) for text in texts]
    wanted = [range(end - (count or length), end) for end, length, count in _spans(lengths, rows)]
    inputs = packed(model.config, texts, max_seq_len or max(lengths))
    inputs["select"] = torch.eye(sum(lengths))[None, [row for span in wanted for row in span]]
    found = step(model, inputs)
    logits = list(torch.split(found["logits"][0], [len(span) for span in wanted]))
    cached = {
        name: torch.split(value, lengths, dim=1) for name, value in found.items() if role_and_layer(name)[0] in ROWS
    }
    return Expected(logits, [{name: parts[text] for name, parts in cached.items()} for text in range(len(texts))])


def perturbed(model: Llama) -> Llama:
    """Changes a model's embeddings in place by about one part in a million, a few bits of a float32. The results of the
    changed model are as accurate as those of the original.
    """
    model.set_submodule("tok_embeddings", _Perturbed(model.tok_embeddings))
    return model


class _Perturbed(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.embedding(tokens)
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        return found * (1 + 1e-6 * noise)


def packed(config: ModelConfig, texts: Sequence[Sequence[int]], max_seq_len: int) -> dict[str, Tensor]:
    """Returns all inputs of `export.lowering.trace.step` except `select`, for texts packed into one sequence. A mask
    separates the texts, and each piece of the model is run only once.

    Args:
        max_seq_len: length for which the rotary tables are made.
    """
    positions = Positions.of(config, max_seq_len)
    inputs = {"tokens": torch.tensor([[token for text in texts for token in text]])}
    for name in names(config):
        made = [positions.make(name, 0, len(text), capacity=0) for text in texts]
        inputs[name] = _apart(made) if name.endswith("mask") else torch.cat(made, dim=1)
    return inputs


def _spans(lengths: Sequence[int], rows: Sequence[int] | None) -> Iterator[tuple[int, int, int]]:
    end = 0
    for length, count in zip(lengths, rows or [0] * len(lengths), strict=True):
        end += length
        yield end, length, count


def _apart(masks: Sequence[Tensor]) -> Tensor:
    """Joins masks [1 or H, L, L] along the diagonal of one mask, in which they do not see each other."""
    total, start = sum(mask.shape[-1] for mask in masks), 0
    joined = torch.full((len(masks[0]), total, total), HIDDEN)
    for mask in masks:
        end = start + mask.shape[-1]
        joined[:, start:end, start:end] = mask
        start = end
    return joined
