"""The Llama transformer, written so that torch.export sees one static graph.

The graph depends on the position only through `cos`, `sin` and `mask`, which `preproc` computes outside it. The KV
cache is an input owned by the runtime, and the graph returns only the rows to append to it. The same module is trained,
run eagerly and exported. Features that other model families add to Llama are fields of ModelConfig, and each is
implemented in one place here.

    B   sequences in the batch          D    model width (dim)            T   capacity of a block's cache
    L   tokens of this step             Dh   width of a head (head_dim)   R   rows for which logits are computed
    H   query heads   K   KV heads      G    query heads per KV head (H = K * G)
    F   feed-forward width              V    vocabulary                   P   rotated pairs per head, usually Dh/2
    E   experts
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activations import activation
from model.config import ModelConfig
from model.kv_row_format import decode, encode
from model.norm import Norm, QKNorm, last_mean
from model.rotary import Angles, block_angles, rope


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Keeps values within (-cap, cap): cap * tanh(x / cap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2)."""
    return x if cap is None else torch.tanh(x * (1 / cap)) * cap


class BlockCache(NamedTuple):
    """The cached rows of one block: its keys, already rotated, and its values, [B*K, T, Dh] each."""

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) over the cached rows and the L new rows.

    It runs in three parts: `project`, `attend` and `wo`.

    Attributes:
        kv_dtype: dtype of the KV cache, whose rounding is applied to the new keys and values; see
            `model.kv_row_format`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_kv_heads = config.n_kv_heads
        self.group = config.n_heads // config.n_kv_heads
        self.head_dim = config.head_dim
        self.first_pair = config.first_pair(layer)
        self.pairs = config.rotated // 2
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.softcap = config.attention_softcap
        self.kv_dtype = "float32"
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=config.out_bias)
        self.q_norm = QKNorm(config, config.n_heads) if config.qk_norm else nn.Identity()
        self.k_norm = QKNorm(config, config.n_kv_heads) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps [B, L, D] to queries [B, L, H*Dh] and to keys and values [B, L, K*Dh], before rotation."""
        return self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        angles: Angles | None,
        mask: Tensor,
        cache: BlockCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes attention from the L new rows to the T cached and L new positions.

        Args:
            q, k, v: the results of `project`.
            angles: cos and sin, [B, L, P] each, or [B, L, 2P] if local blocks have frequencies of their own; None for a
                model without rotary embedding.
            mask: [B, L, T+L], or [B*H, L, T+L] if it differs between heads. It is added to the scores: 0 or a bias for
                visible positions, a large negative number for hidden ones.
            cache: the T cached rows; None if T is 0.

        Returns:
            The attention output [B, L, H*Dh], and the rows to append to the two caches, [B*K, L, Dh] each.
        """
        B, L, _ = q.shape
        K, G, Dh = self.n_kv_heads, self.group, self.head_dim
        T = 0 if cache is None else cache.k.shape[1]

        q = q.view(B, L, K * G, Dh).transpose(1, 2)  # [B, H, L, Dh]
        k = k.view(B, L, K, Dh).transpose(1, 2)  # [B, K, L, Dh]
        v = v.view(B, L, K, Dh).transpose(1, 2)
        q = q * self.scale
        if own := block_angles(angles, self.first_pair, self.pairs):
            cos, sin = (table.view(B, 1, L, -1) for table in own)
            q, k = rope(q, cos, sin), rope(k, cos, sin)

        # The G query heads of a KV head become G*L rows of one matrix, so the keys and values are not repeated.
        q = q.reshape(B * K, G * L, Dh)
        k, v = k.reshape(B * K, L, Dh), v.reshape(B * K, L, Dh)
        if self.kv_dtype != "float32":
            k, v = (decode(encode(rows, self.kv_dtype)) for rows in (k, v))

        # Scores and outputs are computed in two parts, cached and new, so that the caches are never copied.
        scores = torch.bmm(q, k.transpose(1, 2))
        if cache is not None:
            scores = torch.cat((torch.bmm(q, cache.k.transpose(1, 2)), scores), dim=-1)
        scores = softcap(scores.view(B, K * G, L, T + L), self.softcap) + mask.view(B, -1, L, T + L)
        weights = F.softmax(scores, dim=-1).view(B * K, G * L, T + L)
        if cache is None:
            out = torch.bmm(weights, v)  # [B*K, G*L, Dh]
        else:
            out = torch.bmm(weights[..., :T], cache.v) + torch.bmm(weights[..., T:], v)

        return out.view(B, K * G, L, Dh).transpose(1, 2).reshape(B, L, K * G * Dh), k, v


class FeedForward(nn.Module):
    """The feed-forward network: w2(act(w1 x) * w3 x) if gated, as in SwiGLU (Shazeer 2020,
    https://arxiv.org/abs/2002.05202), and w2(act(w1 x)) otherwise.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = activation(config.activation)
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=config.ffn_bias)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=config.ffn_bias)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=config.ffn_bias) if config.gated else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, D] to [B, L, D]."""
        hidden = self.activation(self.w1(x))
        return self.w2(hidden if self.w3 is None else hidden * self.w3(x))


class Experts(nn.Module):
    """A mixture of feed-forward networks, of which each token uses the n_chosen_experts with the largest router logits
    (https://arxiv.org/abs/2401.04088, eq. 2).

    Every expert is computed for every token, with weight 0 for the experts not chosen, because a static graph cannot
    skip them. With weights in blocks, an operator can: export.weights.formats.chosen_experts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.chosen = float(config.n_chosen_experts)
        self.router = nn.Linear(config.dim, config.n_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, D] to [B, L, D]."""
        B, E = x.shape[0], len(self.experts)
        logits = self.router(x)
        # The rank of an expert is the number of larger logits. Counting them avoids a sort, which backends do not
        # delegate.
        larger = logits.view(-1, 1, E) - logits.view(-1, E, 1)
        rank = last_mean((larger * 1e30).clamp(0, 1)).view(B, -1, E) * float(E)
        weights = F.softmax(logits, dim=-1) * (self.chosen - rank).clamp(0, 1)
        weights = weights / (last_mean(weights) * float(E))
        out = self.experts[0](x) * weights[..., :1]
        for i, expert in enumerate(self.experts[1:], 1):
            out = out + expert(x) * weights[..., i : i + 1]
        return out


class Block(nn.Module):
    """A transformer block: x + attention(norm(x)), then x + feed_forward(norm(x)). A parallel block computes both from
    the same x and adds them together, with one norm or two.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.residual_scale = config.residual_scale
        shares = config.parallel and not config.parallel_norms
        self.attention_norm = Norm(config) if config.pre_norms else nn.Identity()
        self.attention = Attention(config, layer)
        self.ffn_norm = None if shares else Norm(config) if config.pre_norms else nn.Identity()
        self.feed_forward = Experts(config) if config.n_experts else FeedForward(config)
        self.attention_post_norm = Norm(config) if config.post_norms else nn.Identity()
        self.ffn_post_norm = Norm(config) if config.post_norms else nn.Identity()

    def forward(
        self, x: Tensor, angles: Angles | None, mask: Tensor, cache: BlockCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the block on [B, L, D].

        Returns:
            The output [B, L, D] and the rows to append to the caches. The arguments are those of `Attention.attend`.
        """
        out, k, v = self.attention.attend(*self.project(x), angles, mask, cache)
        return self.finish(x, out), k, v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the part before attention: the norm, then `Attention.project`."""
        return self.attention.project(self.attention_norm(x))

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """Computes the part after attention, from the block's input [B, L, D] and the attention output [B, L, H*Dh],
        and returns the block's output [B, L, D].
        """
        attended = x + self.attended(out)
        norm = self.attention_norm if self.ffn_norm is None else self.ffn_norm
        return attended + self._fed(norm(x if self.parallel else attended))

    def attended(self, out: Tensor) -> Tensor:
        """Computes the attention term of the residual stream, [B, L, D], from the attention output [B, L, H*Dh]."""
        return self._scaled(self.attention_post_norm(self.attention.wo(out)))

    def fed(self, x: Tensor) -> Tensor:
        """Computes the feed-forward term of the residual stream, [B, L, D] -> [B, L, D], of a block that is not
        parallel.
        """
        assert self.ffn_norm is not None, "a parallel block may have one norm for both"
        return self._fed(self.ffn_norm(x))

    def _fed(self, normed: Tensor) -> Tensor:
        return self._scaled(self.ffn_post_norm(self.feed_forward(normed)))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1 else x * self.residual_scale


class Head(nn.Module):
    """The final norm and the output layer, which computes the logits of the selected rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = config.logit_scale
        self.softcap = config.logit_softcap
        self.norm = Norm(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=config.head_bias)

    def forward(self, x: Tensor, select: Tensor) -> tuple[Tensor, Tensor]:
        """Computes logits [B, R, V] and the normalised x [B, L, D] from x [B, L, D] and a one-hot selection [B,
        R, L].
        """
        hidden = self.norm(x)
        logits = self.output(torch.bmm(select, hidden))
        return softcap(logits if self.scale == 1 else logits * self.scale, self.softcap), hidden


class Step(NamedTuple):
    """The result of one step of a model or of a shard.

    Attributes:
        k_rows, v_rows: one tensor [B*K, L, Dh] per block, to append to the caches.
        logits: [B, R, V]; None for a shard without the head.
        hidden: [B, L, D], the normalised output of the last block; None for a shard without the head.
        stream: [B, L, D], the input of the next shard; None if the head is present.
    """

    k_rows: list[Tensor]
    v_rows: list[Tensor]
    logits: Tensor | None = None
    hidden: Tensor | None = None
    stream: Tensor | None = None


class Embeddings(nn.Module):
    """The embeddings of a model, and the range of blocks that are present.

    Attributes:
        span: indices of the blocks that are present: all blocks of the model, or those of a shard. A shard has
            embeddings only if it includes block 0, and the head only if it includes the last block.
    """

    def __init__(self, config: ModelConfig, span: range | None = None) -> None:
        super().__init__()
        self.config = config
        self.span = range(config.n_layers) if span is None else span
        if self.begins:
            self.tok_embeddings = _embedding(config.vocab_size, config.dim)
            if config.positions == "learned":
                self.pos_embeddings = _embedding(config.context, config.dim)
            if config.embedding_norm:
                self.embedding_norm = Norm(config)

    @property
    def begins(self) -> bool:
        """Whether the model's first block and embeddings are present."""
        return self.span.start == 0

    @property
    def ends(self) -> bool:
        """Whether the model's last block and head are present."""
        return self.span.stop == self.config.n_layers

    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Maps tokens [B, L] to the input of the first block, [B, L, D]."""
        x = self.tok_embeddings(tokens)
        if positions is not None:
            x = x + self.pos_embeddings(positions)
        if self.config.embedding_norm:
            x = self.embedding_norm(x)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale


def _embedding(rows: int, dim: int) -> nn.Embedding:
    """Returns an embedding with PyTorch's initial values; without any on the meta device, where it would take a second
    to import the code for them.
    """
    weights = torch.empty(rows, dim)
    if not weights.is_meta:
        nn.init.normal_(weights)
    found: nn.Embedding = nn.Embedding.from_pretrained(weights, freeze=False)  # type: ignore[no-untyped-call]
    return found


class Llama(Embeddings):
    """A Llama model, or a shard of one: token ids and position inputs in, logits and new cache rows out."""

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
        caches: Sequence[BlockCache] | None = None,
        positions: Tensor | None = None,
    ) -> Step:
        """Runs one step on L tokens of each sequence.

        Args:
            x: tokens [B, L], int64; for a shard without embeddings, the stream [B, L, D] from the preceding block.
            angles: as in `Attention.attend`.
            masks: one per block, as in `Attention.attend`; blocks with equal masks may share one tensor.
            select: [B, R, L], one-hot rows that select the positions of each sequence for which logits are computed;
                None for a shard without the head.
            caches: one per block; None if nothing is cached.
            positions: [B, L], int64, for a model with learned position embeddings.
        """
        if self.begins:
            x = self.embed(x, positions)
        k_rows, v_rows, none = [], [], [None] * len(self.span)
        for layer, mask, cache in zip(self.layers.values(), masks, caches or none, strict=True):
            x, k, v = layer(x, angles, mask, cache)
            k_rows.append(k)
            v_rows.append(v)
        if not self.ends:
            return Step(k_rows, v_rows, stream=x)
        logits, hidden = self.head(x, select)
        return Step(k_rows, v_rows, logits, hidden)
