"""Slices of a model for tensor parallelism. A slice holds a part of every matrix, so that several processes each
compute a part of every block.

The rows of wq, wk, wv, w1, w3, the embedding and the head, and the columns of wo and w2, are divided among the slices
(Megatron-LM, https://arxiv.org/abs/1909.08053, section 3). Each half of a block returns one slice's part of a sum over
all slices. The runtime adds up the parts and adds the sum to the residual stream, which is the same for all slices.

All slices have the same shapes. If the heads, hidden units or tokens of a model cannot be divided evenly, the last
slices are padded. Padding rows are zero, so their results are zero even after activations are quantised. Padding
columns are zero, so they add nothing to a sum.
"""

from typing import cast

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.fused_attention import settings
from model.model import Block, Embeddings, Llama
from model.rotary import Angles, block_angles

BY_COLUMNS = ("wo", "w2")
"""Linear layers divided by columns: a slice takes a part of their inputs."""

BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "tok_embeddings", "output")
"""Layers divided by rows."""


def ceil_share(whole: int, count: int) -> int:
    """Returns the number of heads, hidden units or tokens in each of `count` slices, rounded up."""
    return -(-whole // count)


def columns(config: ModelConfig, count: int) -> dict[str, int]:
    """Returns the number of columns that a slice has of each layer in BY_COLUMNS. Heads and hidden units are never
    divided.
    """
    return {"wo": ceil_share(config.n_heads, count) * config.head_dim, "w2": ceil_share(config.hidden_dim, count)}


class Rows(nn.Module):
    """A range of rows of an embedding.

    Attributes:
        first: token id of the first row.
        count: number of rows.
    """

    def __init__(self, embedding: nn.Module, first: int, count: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.first = first
        self.count = count

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens [B, L] to [B, L, D], with zeros for tokens whose rows are in other slices."""
        wanted = tokens - self.first
        row = wanted.clamp(0, self.count - 1)
        return self.embedding(row) * (row == wanted).unsqueeze(-1).float()


class Embed(Embeddings):
    """The embeddings of a slice, which hold a part of the token embedding's rows."""

    def __init__(self, model: Llama, number: int) -> None:
        """Reuses the embeddings of `model`, the model of slice `number`."""
        with torch.device("meta"):
            super().__init__(model.config)
        for name, _ in list(self.named_children()):
            setattr(self, name, getattr(model, name))
        count = model.config.vocab_size
        self.set_submodule("tok_embeddings", Rows(model.tok_embeddings, number * count, count))

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Maps tokens [B, L] to this slice's part of the embeddings' sum, [B, L, D]."""
        return self.embed(tokens, positions)


class Project(nn.Module):
    """The part of a block before attention."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps [B, L, D] to the slice's queries, keys and values."""
        return self.block.project(x)


class Merge(nn.Module):
    """The part of a block's first half after attention."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, out: Tensor) -> tuple[Tensor]:
        """Maps the attention output of the slice's heads, [B, L, H*Dh], to this slice's part of the attention sum, [B,
        L, D].
        """
        return (self.block.attended(out),)


class Attend(nn.Module):
    """The first half of a block: attention and its projections."""

    def __init__(self, model: Llama, layer: int) -> None:
        super().__init__()
        block = cast(Block, model.layers[str(layer)])
        self.project = Project(block)
        self.merge = Merge(block)
        self._pairs = model.config.rotated // 2
        self._first_pair, *self._settings = settings(block.attention, model.config.window(layer))

    def forward(
        self, x: Tensor, angles: Angles | None, start: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes this slice's part of the attention sum, [B, L, D] -> [B, L, D], and the rows to append to the
        caches.

        `start`, `k_cache` and `v_cache` are as in `fused_attention.attention`.
        """
        q, k, v = self.project(x)
        cos, sin = block_angles(angles, self._first_pair, self._pairs) or (None, None)
        out, k, v = torch.ops.llama_pte.attention(q, k, v, cos, sin, None, k_cache, v_cache, start, *self._settings)
        (part,) = self.merge(out)
        return part, k, v


class Feed(nn.Module):
    """The second half of a block: the feed-forward."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Maps [B, L, D] to this slice's part of the feed-forward sum, [B, L, D]."""
        return (self.block.fed(x),)


class SlicedLlama(nn.Module):
    """A slice of a Llama model, divided into half-blocks that are run separately. It shares the modules of the model it
    is built from.

    Attributes:
        embed: the embeddings.
        attend, feed: the two halves of each block, keyed by the block's number.
        head: the model's head, which computes a part of the logits.
    """

    def __init__(self, model: Llama, number: int) -> None:
        """Divides a model that already holds only the parts of slice `number`."""
        super().__init__()
        assert model.config.positions != "alibi", "the heads of a slice would need slopes of their own"
        self.embed = Embed(model, number)
        self.attend = nn.ModuleDict({name: Attend(model, int(name)) for name in model.layers})
        self.feed = nn.ModuleDict({name: Feed(cast(Block, block)) for name, block in model.layers.items()})
        self.head = model.head
