"""The Llama transformer, written so that torch.export sees one static graph.

Position enters only through `cos`, `sin` and `mask`, which `preproc` slices outside the graph; the KV cache is an
input, owned by the runtime, and the graph returns just the rows it adds. The same module trains, runs eagerly and is
exported.

    B   sequences in the batch          D    model width (dim)            T   capacity of the cache
    L   tokens of this step             Dh   width of a head (head_dim)   R   rows whose logits are wanted
    H   query heads   K   KV heads      G    query heads per KV head (H = K * G)
    F   feed-forward width              V    vocabulary
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]. The mean runs over two dims of a 4-D view: the one form every backend keeps whole."""
        B, L, D = x.shape
        mean_square = (x * x).view(B, L, 1, D).mean((2, 3), keepdim=True).view(B, L, 1)
        return x * torch.rsqrt(mean_square + self.eps) * self.weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head's pairs (i, i + Dh/2) by the position's angle (RoFormer, https://arxiv.org/abs/2104.09864).

    Args:
        x: [..., L, Dh], in the half-split order of Hugging Face checkpoints.
        cos, sin: [..., L, Dh/2], from `preproc.rope`.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) over the cache and the L new rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_kv_heads = config.n_kv_heads
        self.group = config.n_heads // config.n_kv_heads
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attends from the L rows of x to T cached and L new positions.

        Args:
            x: [B, L, D].
            cos, sin: [B, L, Dh/2].
            mask: [B, L, T+L], added to the scores: 0 where visible, a large negative number elsewhere.
            k_cache, v_cache: [B*K, T, Dh], keys already rotated.

        Returns:
            [B, L, D], and the rows to append to the caches, [B*K, L, Dh] each.
        """
        B, L, _ = x.shape
        K, G, Dh = self.n_kv_heads, self.group, self.head_dim
        T = k_cache.shape[1]

        q = self.wq(x).view(B, L, K * G, Dh).transpose(1, 2)  # [B, H, L, Dh]
        k = self.wk(x).view(B, L, K, Dh).transpose(1, 2)  # [B, K, L, Dh]
        v = self.wv(x).view(B, L, K, Dh).transpose(1, 2)
        cos, sin = cos.view(B, 1, L, Dh // 2), sin.view(B, 1, L, Dh // 2)

        # A KV head serves its G query heads as G*L rows of one matrix, so nothing is repeated or expanded.
        q = rope(q * Dh**-0.5, cos, sin).view(B * K, G * L, Dh)
        k = rope(k, cos, sin).view(B * K, L, Dh)
        v = v.reshape(B * K, L, Dh)

        # Scores and outputs are taken in two parts, cached and new: the caches are read in place, never concatenated.
        scores = torch.cat((torch.bmm(q, k_cache.transpose(1, 2)), torch.bmm(q, k.transpose(1, 2))), dim=-1)
        scores = scores.view(B, K * G, L, T + L) + mask.view(B, 1, L, T + L)
        weights = F.softmax(scores, dim=-1).view(B * K, G * L, T + L)
        out = torch.bmm(weights[..., :T], v_cache) + torch.bmm(weights[..., T:], v)  # [B*K, G*L, Dh]

        out = out.view(B, K * G, L, Dh).transpose(1, 2).reshape(B, L, K * G * Dh)
        return self.wo(out), k, v


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes as in `Attention.forward`."""
        out, k, v = self.attention(self.attention_norm(x), cos, sin, mask, k_cache, v_cache)
        x = x + out
        return x + self.feed_forward(self.ffn_norm(x)), k, v


class Llama(nn.Module):
    """Token ids and position data in, logits and new cache rows out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        select: Tensor,
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One step: L tokens of each sequence.

        Args:
            tokens: [B, L], int64.
            cos, sin, mask: as in `Attention.forward`.
            select: [R, B*L], one-hot rows naming the positions whose logits are wanted.
            k_caches, v_caches: n_layers tensors [B*K, T, Dh].

        Returns:
            logits [R, V], and n_layers tensors [B*K, L, Dh] each of new keys and values.
        """
        x = self.tok_embeddings(tokens)
        k_rows, v_rows = [], []
        for layer, k_cache, v_cache in zip(self.layers, k_caches, v_caches, strict=True):
            x, k, v = layer(x, cos, sin, mask, k_cache, v_cache)
            k_rows.append(k)
            v_rows.append(v)
        R, BL = select.shape
        rows = torch.bmm(select.view(1, R, BL), x.view(1, BL, self.config.dim))  # [1, R, D]
        logits = self.output(self.norm(rows)).view(R, self.config.vocab_size)
        return logits, k_rows, v_rows
