"""The Llama transformer, written so that torch.export sees one static graph.

Position enters only through `cos`, `sin` and `mask`, which `preproc` slices outside the graph; the KV cache is an
input, owned by the runtime, and the graph returns just the rows it adds. The same module trains, runs eagerly and is
exported. What other families add to Llama are features of ModelConfig, each of which stands in one place here.

    B   sequences in the batch          D    model width (dim)            T   capacity of a block's cache
    L   tokens of this step             Dh   width of a head (head_dim)   R   rows whose logits are wanted
    H   query heads   K   KV heads      G    query heads per KV head (H = K * G)
    F   feed-forward width              V    vocabulary                   P   rotated pairs of a head, mostly Dh/2
    E   experts
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.kv_row_format import decode, encode
from model.rotary import Angles, rope


class Norm(nn.Module):
    """RMSNorm, x / rms(x) * weight (https://arxiv.org/abs/1910.07467, eq. 4), or LayerNorm, which subtracts the mean
    first (https://arxiv.org/abs/1607.06450, eq. 4) and may add a bias.
    """

    def __init__(self, config: ModelConfig, dim: int | None = None) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.centred = config.norm == "layer"
        self.weight = nn.Parameter(torch.ones(dim or config.dim))
        self.bias = nn.Parameter(torch.zeros(dim or config.dim)) if config.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D], or the same for each head of [B, L, H, Dh]."""
        if self.centred:
            x = x - last_mean(x)
        x = x * torch.rsqrt(last_mean(x * x) + self.eps) * self.weight
        return x if self.bias is None else x + self.bias


def last_mean(x: Tensor) -> Tensor:
    """[..., D] -> [..., 1]. The mean runs over two dims of a 4-D view: the one form every backend keeps whole."""
    return x.reshape(1, -1, 1, x.shape[-1]).mean((2, 3), keepdim=True).view(x.shape[0], -1, *x.shape[2:-1], 1)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Keeps values within (-cap, cap): cap * tanh(x / cap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2)."""
    return x if cap is None else torch.tanh(x * (1 / cap)) * cap


class Attention(nn.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) over the cache and the L new rows: `project`,
    `attend`, and `wo`.

    Attributes:
        kv_dtype: keys and values are rounded to what a cache of this dtype would hold, see `model.kv_row_format`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_kv_heads = config.n_kv_heads
        self.group = config.n_heads // config.n_kv_heads
        self.head_dim = config.head_dim
        self.rotates = config.positions == "rope" and layer not in config.nope_layers
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.kv_dtype = "float32"
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=config.out_bias)
        self.q_norm = Norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> queries [B, L, H*Dh], keys and values [B, L, K*Dh], not rotated yet."""
        return self._normed(self.q_norm, self.wq(x)), self._normed(self.k_norm, self.wk(x)), self.wv(x)

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        if isinstance(norm, nn.Identity):
            return x
        return norm(x.view(x.shape[0], -1, x.shape[2] // self.head_dim, self.head_dim)).view(x.shape[0], -1, x.shape[2])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: Angles | None,
        mask: Tensor,
        k_cache: Tensor | None = None,
        v_cache: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attends from L rows to T cached and L new positions.

        Args:
            q, k, v: as `project` returns them.
            angles: cos and sin, [B, L, P] each; None where the model does not rotate.
            mask: [B, L, T+L], or [B*H, L, T+L] where heads differ, added to the scores: 0 or a bias where visible, a
                large negative number elsewhere.
            k_cache, v_cache: [B*K, T, Dh], keys already rotated; None for T = 0.

        Returns:
            [B, L, H*Dh], and the rows to append to the caches, [B*K, L, Dh] each.
        """
        B, L, _ = q.shape
        K, G, Dh = self.n_kv_heads, self.group, self.head_dim
        T = 0 if k_cache is None else k_cache.shape[1]

        q = q.view(B, L, K * G, Dh).transpose(1, 2)  # [B, H, L, Dh]
        k = k.view(B, L, K, Dh).transpose(1, 2)  # [B, K, L, Dh]
        v = v.view(B, L, K, Dh).transpose(1, 2)
        q = q * self.scale
        if self.rotates and angles is not None:
            cos, sin = (table.view(B, 1, L, -1) for table in angles)
            q, k = rope(q, cos, sin), rope(k, cos, sin)

        # A KV head serves its G query heads as G*L rows of one matrix, so nothing is repeated or expanded.
        q = q.reshape(B * K, G * L, Dh)
        k, v = k.reshape(B * K, L, Dh), v.reshape(B * K, L, Dh)
        if self.kv_dtype != "float32":
            k, v = (decode(encode(rows, self.kv_dtype)) for rows in (k, v))

        # Scores and outputs are taken in two parts, cached and new: the caches are read in place, never concatenated.
        scores = torch.bmm(q, k.transpose(1, 2))
        if k_cache is not None:
            scores = torch.cat((torch.bmm(q, k_cache.transpose(1, 2)), scores), dim=-1)
        scores = softcap(scores.view(B, K * G, L, T + L), self.softcap) + mask.view(B, -1, L, T + L)
        weights = F.softmax(scores, dim=-1).view(B * K, G * L, T + L)
        if v_cache is None:
            out = torch.bmm(weights, v)  # [B*K, G*L, Dh]
        else:
            out = torch.bmm(weights[..., :T], v_cache) + torch.bmm(weights[..., T:], v)

        return out.view(B, K * G, L, Dh).transpose(1, 2).reshape(B, L, K * G * Dh), k, v


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh (https://arxiv.org/abs/1606.08415, section 2), written out: backends take the exact one for it."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))  # sqrt(2 / pi)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
}


class FeedForward(nn.Module):
    """Gated, w2(act(w1 x) * w3 x) as in SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202), or w2(act(w1 x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=config.ffn_bias)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=config.ffn_bias)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=config.ffn_bias) if config.gated else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        hidden = self.activation(self.w1(x))
        return self.w2(hidden if self.w3 is None else hidden * self.w3(x))


class Experts(nn.Module):
    """A mixture of feed-forwards, of which a token takes the likeliest few (https://arxiv.org/abs/2401.04088, eq. 2).

    All of them are computed and the others weighted by 0: a static graph cannot leave them out.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.chosen = float(config.n_chosen_experts)
        self.router = nn.Linear(config.dim, config.n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        B, E = x.shape[0], len(self.experts)
        logits = self.router(x)
        # Where an expert ranks is how many have larger logits; counting needs no sort, which backends leave outside.
        larger = logits.view(-1, 1, E) - logits.view(-1, E, 1)
        rank = last_mean((larger * 1e30).clamp(0, 1)).view(B, -1, E) * float(E)
        weights = F.softmax(logits, dim=-1) * (self.chosen - rank).clamp(0, 1)
        weights = weights / (last_mean(weights) * float(E))
        out = self.experts[0](x) * weights[..., :1]
        for i, expert in enumerate(self.experts[1:], 1):
            out = out + expert(x) * weights[..., i : i + 1]
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); where it is parallel, both at once from one norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.attention_norm = Norm(config)
        self.attention = Attention(config, layer)
        self.ffn_norm = None if config.parallel else Norm(config)
        self.feed_forward = Experts(config) if config.n_experts else FeedForward(config)
        self.attention_post_norm = Norm(config) if config.post_norms else nn.Identity()
        self.ffn_post_norm = Norm(config) if config.post_norms else nn.Identity()

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        mask: Tensor,
        k_cache: Tensor | None = None,
        v_cache: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> [B, L, D] and the new rows; the others as in `Attention.attend`."""
        out, k, v = self.attention.attend(*self.project(x), angles, mask, k_cache, v_cache)
        return self.finish(x, out), k, v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention; as `Attention.project`."""
        return self.attention.project(self.attention_norm(x))

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """What comes behind it: the block's input [B, L, D] and attention's result [B, L, H*Dh] -> [B, L, D]."""
        attended = x + self.attended(out)
        return attended + self._fed(self.attention_norm(x) if self.ffn_norm is None else self.ffn_norm(attended))

    def attended(self, out: Tensor) -> Tensor:
        """Attention's contribution to the stream: its result [B, L, H*Dh] -> [B, L, D]."""
        return self._scaled(self.attention_post_norm(self.attention.wo(out)))

    def fed(self, x: Tensor) -> Tensor:
        """The feed-forward's, where it has a norm of its own: [B, L, D] -> [B, L, D]."""
        assert self.ffn_norm is not None, "a parallel block has one norm for both"
        return self._fed(self.ffn_norm(x))

    def _fed(self, normed: Tensor) -> Tensor:
        return self._scaled(self.ffn_post_norm(self.feed_forward(normed)))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1 else x * self.residual_scale


class Head(nn.Module):
    """The last norm, and the logits of the rows that are wanted."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = config.logit_scale
        self.softcap = config.logit_softcap
        self.norm = Norm(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=config.head_bias)

    def forward(self, x: Tensor, select: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, D] and one-hot [B, R, L] -> logits [B, R, V], and x normalised, [B, L, D]."""
        hidden = self.norm(x)
        logits = self.output(torch.bmm(select, hidden))
        return softcap(logits if self.scale == 1 else logits * self.scale, self.softcap), hidden


class Step(NamedTuple):
    """What one step of a model, or of some of its blocks, returns.

    Attributes:
        k_rows, v_rows: a tensor [B*K, L, Dh] for each block, to append to the caches.
        logits: [B, R, V]; None where the model does not end here.
        hidden: [B, L, D], what the last block returns, normalised; None where the model does not end here.
        stream: [B, L, D], what the next block takes; None where the model ends here.
    """

    k_rows: list[Tensor]
    v_rows: list[Tensor]
    logits: Tensor | None = None
    hidden: Tensor | None = None
    stream: Tensor | None = None


class Embeddings(nn.Module):
    """The beginning of a model.

    Attributes:
        span: the blocks that are here: all of the model's, or a shard's, which lacks embeddings unless it begins with
            block 0, and the head unless it ends with the last.
    """

    def __init__(self, config: ModelConfig, span: range | None = None) -> None:
        super().__init__()
        self.config = config
        self.span = range(config.n_layers) if span is None else span
        if self.begins:
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
            if config.positions == "learned":
                self.pos_embeddings = nn.Embedding(config.context, config.dim)

    @property
    def begins(self) -> bool:
        """Whether the model begins here."""
        return self.span.start == 0

    @property
    def ends(self) -> bool:
        """Whether the model ends here."""
        return self.span.stop == self.config.n_layers

    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """[B, L] -> [B, L, D]: what the first block takes."""
        x = self.tok_embeddings(tokens)
        if positions is not None:
            x = x + self.pos_embeddings(positions)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale


class Llama(Embeddings):
    """Token ids and position data in, logits and new cache rows out; or a shard of that."""

    def __init__(self, config: ModelConfig, span: range | None = None) -> None:
        super().__init__(config, span)
        self.layers = nn.ModuleDict({str(layer): Block(config, layer) for layer in self.span})
        if self.ends:
            self.head = Head(config)
        if self.begins and self.ends and config.tied:
            self.head.output.weight = self.tok_embeddings.weight

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        masks: Sequence[Tensor],
        select: Tensor | None,
        k_caches: Sequence[Tensor | None] | None = None,
        v_caches: Sequence[Tensor | None] | None = None,
        positions: Tensor | None = None,
    ) -> Step:
        """One step: L tokens of each sequence.

        Args:
            x: tokens [B, L], int64; or the stream [B, L, D] of the block before, where the model does not begin here.
            angles: as in `Attention.attend`.
            masks: one for each block, as in `Attention.attend`; equal ones may be one tensor.
            select: [B, R, L], one-hot rows naming each sequence's positions whose logits are wanted; None where the
                model does not end here.
            k_caches, v_caches: a tensor [B*K, T, Dh] for each block; None where nothing is cached.
            positions: [B, L], int64, where positions are learned.
        """
        if self.begins:
            x = self.embed(x, positions)
        k_rows, v_rows, none = [], [], [None] * len(self.span)
        caches = zip(k_caches or none, v_caches or none, strict=True)
        for layer, mask, (k_cache, v_cache) in zip(self.layers.values(), masks, caches, strict=True):
            x, k, v = layer(x, angles, mask, k_cache, v_cache)
            k_rows.append(k)
            v_rows.append(v)
        if not self.ends:
            return Step(k_rows, v_rows, stream=x)
        logits, hidden = self.head(x, select)
        return Step(k_rows, v_rows, logits, hidden)
