"""A slice of a model: a part of every matrix, so that several processes each compute a part of every block.

Rows of wq, wk, wv, w1 and w3, and columns of wo and w2, are dealt out, and so are the rows of embedding and head
(Megatron-LM, https://arxiv.org/abs/1909.08053, section 3). What a slice's half of a block returns is its part of a sum
over all slices; the runtime adds the parts up, and adds the sum to the stream, which all slices then take.

All slices have the same shapes. Where a model's heads, hidden units or tokens cannot be dealt out evenly, the last
slices have some that the model has not. Those have rows of zeros, and so give zeros, whatever activations are rounded
to; and columns of zeros, and so add nothing to a sum.
"""

from typing import cast

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.fused_attention import settings
from model.model import Block, Embeddings, Llama
from model.rotary import Angles

BY_COLUMNS = ("wo", "w2")
"""Linear layers of which a slice has columns, and so takes a part of the inputs."""

BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "tok_embeddings", "output")
"""Layers of which a slice has rows."""


def ceil_share(whole: int, count: int) -> int:
    """How many of a model's heads, hidden units or tokens each of `count` slices has."""
    return -(-whole // count)


def columns(config: ModelConfig, count: int) -> dict[str, int]:
    """How many columns of each layer of BY_COLUMNS a slice has: those of whole heads, and of whole hidden units."""
    return {"wo": ceil_share(config.n_heads, count) * config.head_dim, "w2": ceil_share(config.hidden_dim, count)}


class Rows(nn.Module):
    """Some rows of an embedding.

    Attributes:
        first: the token that the first of them belongs to.
        count: how many there are.
    """

    def __init__(self, embedding: nn.Module, first: int, count: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.first = first
        self.count = count

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]: zeros for tokens whose rows are elsewhere."""
        wanted = tokens - self.first
        row = wanted.clamp(0, self.count - 1)
        return self.embedding(row) * (row == wanted).unsqueeze(-1).float()


class Embed(Embeddings):
    """The beginning of a model, of which a slice has some rows."""

    def __init__(self, model: Llama, number: int) -> None:
        """Takes the embeddings of `model`, which is slice `number`."""
        with torch.device("meta"):
            super().__init__(model.config)
        for name, _ in list(self.named_children()):
            setattr(self, name, getattr(model, name))
        count = model.config.vocab_size
        self.set_submodule("tok_embeddings", Rows(model.tok_embeddings, number * count, count))

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """[B, L] -> [B, L, D], a part of a sum."""
        return self.embed(tokens, positions)


class Project(nn.Module):
    """What comes before attention."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> the slice's queries, keys and values."""
        return self.block.project(x)


class Merge(nn.Module):
    """What comes behind it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, out: Tensor) -> tuple[Tensor]:
        """The result of the slice's heads, [B, L, H*Dh] -> [B, L, D], a part of a sum."""
        return (self.block.attended(out),)


class Attend(nn.Module):
    """The first half of a block."""

    def __init__(self, model: Llama, layer: int) -> None:
        super().__init__()
        block = cast(Block, model.layers[str(layer)])
        self.project = Project(block)
        self.merge = Merge(block)
        self.rotates, *self._settings = settings(block.attention, model.config.window(layer))

    def forward(
        self, x: Tensor, angles: Angles | None, start: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> [B, L, D], a part of a sum, and the new rows; the others as in `fused_attention.attention`."""
        q, k, v = self.project(x)
        cos, sin = angles if self.rotates and angles else (None, None)
        out, k, v = torch.ops.llama_pte.attention(q, k, v, cos, sin, None, k_cache, v_cache, start, *self._settings)
        (part,) = self.merge(out)
        return part, k, v


class Feed(nn.Module):
    """The second half of a block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """[B, L, D] -> [B, L, D], a part of a sum."""
        return (self.block.fed(x),)


class SlicedLlama(nn.Module):
    """A slice of a Llama in halves, each of which is run by itself. Its pieces are those of the model it is made from.

    Attributes:
        embed, attend, feed, head: the halves, attend and feed by the number of their block; the head, which has some
            rows of the logits, is the model's.
    """

    def __init__(self, model: Llama, number: int) -> None:
        """Takes a model with the slice's share of everything, which is slice `number`."""
        super().__init__()
        assert model.config.positions != "alibi", "the heads of a slice would need slopes of their own"
        self.embed = Embed(model, number)
        self.attend = nn.ModuleDict({name: Attend(model, int(name)) for name in model.layers})
        self.feed = nn.ModuleDict({name: Feed(cast(Block, block)) for name, block in model.layers.items()})
        self.head = model.head
