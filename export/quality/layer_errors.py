"""Errors of each piece of a quantised model, measured by running it and the float32 model side by side.

Each piece of both models is read, run on both streams, and discarded, so that neither model is ever fully in memory.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.lowering.trace import step
from export.weights.rows import row_chunks
from export.weights.source import WeightSource, piece_names
from model.model import Head, Llama
from model.rotary import Angles

_LOGITS_AT_ONCE = 1 << 23
"""Number of elements of logits that are computed at a time."""


@dataclass(frozen=True)
class Loss:
    """Loss caused by quantisation of one piece of the model.

    An error is |wrong - right|^2 / |right|^2 of a token, averaged over all tokens. In Llama models, the first token can
    be a thousand times larger than the others; because of the division, it does not hide them.

    Attributes:
        name: tok_embeddings, layers.0, head.
        own: error of the piece's contribution to the stream, or of its result for an embedding or the head, with the
            float32 model's input.
        stream: error of its result if all pieces before it are quantised as well.
        mse: mean squared difference of its result if all pieces before it are quantised as well, not relative.
        linears: error of each linear layer's result, with the float32 model's input.
    """

    name: str
    own: float
    stream: float
    mse: float
    linears: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        """The piece and its linear layer with the largest error, such as layers.3 (feed_forward.w2)."""
        return f"{self.name} ({max(self.linears, key=self.linears.__getitem__)})" if self.linears else self.name


@torch.no_grad()
def measure_layer_errors(
    source: WeightSource, inputs: Mapping[str, Tensor], take: Callable[[int, Tensor, Tensor], None]
) -> tuple[Loss, ...]:
    """Runs both models and returns the loss of every piece, in the model's order.

    Args:
        source: source of the quantised model.
        inputs: inputs of `export.lowering.trace.step` for one sequence of N tokens, except `select`; all rows are used.
        take: receives the logits, a few rows at a time: number of the first row, float32 logits, and quantised logits.
    """
    losses = list[Loss]()
    hidden = step(_both(source, losses), {**inputs, "select": torch.zeros(0)})["hidden"]
    losses.append(_heads(source, hidden, take))
    return tuple(losses)


def _both(source: WeightSource, losses: list[Loss]) -> Llama:
    """Returns both models as one of batch size 2: after the embedding, the first stream is that of the float32 model
    and the second that of the quantised one. The head is replaced by a module that returns the streams. Each piece
    appends its loss to `losses` when it is run.
    """
    made: dict[str, nn.Module] = {"head": _Streams()}
    for name in piece_names(source.config):
        if name != "head":
            made[name] = (_Blocks if name.startswith("layers.") else _Embeddings)(source, name, losses)
    return source.model(made)


class _Streams(nn.Module):
    def forward(self, x: Tensor, select: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class _Pair(nn.Module):
    def __init__(self, source: WeightSource, name: str, losses: list[Loss]) -> None:
        super().__init__()
        self.source, self.name, self.losses = source, name, losses


class _Embeddings(_Pair):
    def forward(self, ids: Tensor) -> Tensor:
        """Maps ids [1, L] to the two streams [2, L, D]."""
        exact = self.source.unquantised().weight(f"{self.name}.weight")[ids].float()
        found = self.source.piece(self.name)(ids)
        error = _relative(found - exact, exact)
        self.losses.append(Loss(self.name, error, error, _mse(found, exact)))
        return torch.cat((exact, found))


class _Blocks(_Pair):
    def forward(self, x: Tensor, angles: Angles | None, mask: Tensor, cache: None) -> tuple[Tensor, Tensor, Tensor]:
        """Maps the two streams [2, L, D] to the block's results [2, L, D] and the quantised block's new rows. The
        quantised block is also run on the float32 stream, for its own error.
        """
        block = self.source.piece(self.name)
        exact, linears = self._exact(block, x[:1], angles, mask)
        twice = None if angles is None else (angles[0].repeat(2, 1, 1), angles[1].repeat(2, 1, 1))
        found, k, v = block(x, twice, mask.repeat(2, 1, 1))
        own, stream = _relative(found[:1] - exact, exact - x[:1]), _relative(found[1:] - exact, exact)
        self.losses.append(Loss(self.name, own, stream, _mse(found[1:], exact), linears))
        return torch.cat((exact, found[1:])), k, v

    def _exact(
        self, block: nn.Module, x: Tensor, angles: Angles | None, mask: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Returns the float32 result of the block for x, and the error of each linear layer of `block` for the same
        inputs.
        """
        exact, errors = self.source.unquantised().piece(self.name), dict[str, float]()
        for name, layer in exact.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(functools.partial(_compare, errors, name, block.get_submodule(name)))
        return exact(x, angles, mask)[0], errors


def _compare(
    errors: dict[str, float], name: str, other: nn.Module, _: nn.Module, given: tuple[Tensor], out: Tensor
) -> None:
    errors[name] = _relative(other(given[0]) - out, out)


def _heads(source: WeightSource, hidden: Tensor, take: Callable[[int, Tensor, Tensor], None]) -> Loss:
    """Runs both heads on the streams, [2, N, D], a few rows at a time, and returns the head's loss."""
    head, exact_head = source.piece("head"), _float32_head(source.unquantised())
    count, start, sums = max(1, _LOGITS_AT_ONCE // source.config.vocab_size), 0, torch.zeros(3, dtype=torch.float64)
    for part in torch.split(hidden, count, dim=1):
        exact = _logits(exact_head, part[:1])
        own, found = _logits(head, part).chunk(2)
        means = [_relative(own - exact, exact), _relative(found - exact, exact), _mse(found, exact)]
        sums += len(exact) * torch.tensor(means)
        take(start, exact, found)
        start += len(exact)
    own_error, stream, mse = (sums / start).tolist()
    return Loss("head", own_error, stream, mse)


def _logits(head: nn.Module, x: Tensor) -> Tensor:
    """Maps [B, L, D] to logits [B*L, V]."""
    B, L, _ = x.shape
    return head(x, torch.eye(L).repeat(B, 1, 1))[0].flatten(0, 1)


class _InParts(nn.Module):
    """A linear layer whose weight keeps its dtype on storage, and is converted to float32 a part at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([F.linear(x, rows.float()) for rows in row_chunks(self.weight)], dim=-1)
        return out if self.bias is None else out + self.bias


def _float32_head(source: WeightSource) -> nn.Module:
    """Returns the float32 head without a float32 copy of its matrix, which may be the largest of the model."""
    with torch.device("meta"):
        head = Head(source.config)
    state = {role: source.weight(f"head.{role}") for role in head.state_dict()}
    weight, bias = state.pop("output.weight"), state.pop("output.bias", None)
    head.set_submodule("output", _InParts(weight, None if bias is None else bias.float()))
    head.load_state_dict({role: value.float() for role, value in state.items()}, assign=True)
    return head.eval().requires_grad_(False)


def _relative(error: Tensor, right: Tensor) -> float:
    """Returns the mean relative error of rows [..., D], see `Loss`. An error of 0 remains 0 even if `right` is 0."""
    squares, size = error.double().square().sum(-1), right.double().square().sum(-1)
    return float(torch.where(squares == 0, 0.0, squares / size).mean())


def _mse(found: Tensor, right: Tensor) -> float:
    return float((found - right).double().square().mean())
