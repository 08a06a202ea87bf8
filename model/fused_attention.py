"""The Llama model with attention as one custom operator, which reads only the filled part of the caches.

The model is divided into segments between consecutive attentions: the end of one block and the beginning of the next.
The number of tokens appears only in a segment's leading dimensions, so one graph serves prefill and decode.
cpp_runner/src/attention/kernel.inc implements the operator for devices; this module defines what it computes in
PyTorch.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from model.alibi import alibi_slopes
from model.kv_row_format import decode, encode
from model.model import Attention, Block, BlockCache, Embeddings, Head, Llama, Step, softcap
from model.rotary import Angles, block_angles, rope

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? slopes, Tensor k_cache, Tensor v_cache, "
    "Tensor start, float scale, float softcap, int window"
)
_LIBRARY = torch.library.Library("llama_pte", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    f"attention({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    f"attention.out({_ARGUMENTS}, *, Tensor(a!) out, Tensor(b!) k_rows, Tensor(c!) v_rows) -> "
    "(Tensor(a!), Tensor(b!), Tensor(c!))",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def attention(  # noqa: PLR0913  the operator's own
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    slopes: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    scale: float,
    cap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes attention from the L new rows of each sequence to its cached rows and to the new rows themselves.

    Args:
        q, k, v: [B, L, H*Dh], [B, L, K*Dh] and [B, L, K*Dh], before rotation.
        cos, sin: [B, L, P]; None for a block without rotary embedding.
        slopes: [H], the amount subtracted from a score per position of distance (ALiBi); None for a model without
            ALiBi.
        k_cache, v_cache: [B*K, T, W], rows in the format of `model.kv_row_format`; position p is in slot p % T.
        start: [B] int64, position of the first new row of each sequence. The cache holds the last min(start, T)
            positions before it.
        scale: factor of the scores.
        cap: limit of the scores, see `softcap`; 0 for none.
        window: number of positions that a row attends to, including its own; 0 for all.

    Returns:
        The attention output [B, L, H*Dh], and the rows to append to the two caches, [B*K, L, W] each.
    """
    B, L, _ = q.shape
    K, T, dtype = k_cache.shape[0] // B, k_cache.shape[1], str(k_cache.dtype).removeprefix("torch.")
    Dh = k.shape[2] // K
    H = q.shape[2] // Dh
    q, k, v = (x.view(B, L, -1, Dh).transpose(1, 2) for x in (q, k, v))
    if cos is not None and sin is not None:
        q, k = (rope(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k))
    k, v, outs = encode(k, dtype), encode(v, dtype), []
    for b in range(B):
        here = int(start[b])
        cached = torch.arange(max(0, here - T), here)
        keys, values = (
            decode(torch.cat((cache.view(B, K, T, -1)[b, :, cached % T], rows[b]), dim=1)).repeat_interleave(H // K, 0)
            for cache, rows in ((k_cache, k), (v_cache, v))
        )
        new = torch.arange(here, here + L)
        distance = new[:, None] - torch.cat((cached, new))
        scores = softcap(q[b] @ keys.transpose(1, 2) * scale, cap or None)
        if slopes is not None:
            scores = scores - slopes.view(H, 1, 1) * distance
        hidden = (distance < 0) | (distance >= (window or here + L))
        outs.append(scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ values)
    out = torch.stack(outs).transpose(1, 2).reshape(B, L, H * Dh)
    return out, k.reshape(B * K, L, -1), v.reshape(B * K, L, -1)


@torch.library.register_fake("llama_pte::attention")  # type: ignore[untyped-decorator]
def _shapes(q: Tensor, k: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    k_cache = cast(Tensor, others[4])
    rows = (k_cache.shape[0], q.shape[1], k_cache.shape[2])
    return torch.empty_like(q), k_cache.new_empty(rows), k_cache.new_empty(rows)


@torch.library.register_fake("llama_pte::attention.out")  # type: ignore[untyped-decorator]
def _out_shapes(*_: object, out: Tensor, k_rows: Tensor, v_rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return out, k_rows, v_rows


class Segment(nn.Module):
    """The computation between two attentions: the end of one block and the beginning of the next.

    The first segment has no block before it. In the last segment, the head takes the place of the next block, or
    nothing does in a shard without the head.
    """

    def __init__(self, before: Block | None, after: Block | Head | None) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Tensor, out: Tensor | None = None, select: Tensor | None = None) -> tuple[Tensor, ...]:
        """Computes the segment from the residual stream [B, L, D] before the preceding attention and that attention's
        output.

        Returns:
            The queries, keys and values of the next attention, followed by the stream before it unless this is the
            first segment; or the results of the head; or the stream alone.
        """
        if self.before is not None and out is not None:
            x = self.before.finish(x, out)
        if self.after is None:
            return (x,)
        if isinstance(self.after, Head):
            assert select is not None, "the head needs to know which rows are wanted"
            return self.after(x, select)
        q, k, v = self.after.project(x)
        return (q, k, v) if self.before is None else (q, k, v, x)


class FusedLlama(Embeddings):
    """A `Llama`, or a shard of one, divided into segments. It shares the modules of the model it is built from.

    Attributes:
        segments: the segments, one more than there are blocks. The key is the number of the block that begins in the
            segment; for the last segment, the number after the last block.
    """

    def __init__(self, model: Llama) -> None:
        """Reuses the embeddings of `model`, and regroups its blocks and head into segments."""
        config = model.config
        with torch.device("meta"):
            super().__init__(config, model.span)
        for name, _ in list(self.named_children()):
            setattr(self, name, getattr(model, name))
        blocks = [cast(Block, block) for block in model.layers.values()]
        last = model.head if model.ends else None
        sides: list[tuple[Block | None, Block | Head | None]] = list(zip([None, *blocks], [*blocks, last], strict=True))
        numbers = range(self.span.start, self.span.stop + 1)
        self.segments = nn.ModuleDict({str(i): Segment(*both) for i, both in zip(numbers, sides, strict=True)})
        self._pairs = config.rotated // 2
        self._settings = [settings(b.attention, config.window(i)) for i, b in zip(self.span, blocks, strict=True)]
        self._slopes = alibi_slopes(config) if config.positions == "alibi" else None

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        start: Tensor,
        select: Tensor | None,
        caches: Sequence[BlockCache],
        positions: Tensor | None = None,
    ) -> Step:
        """Runs one step. `start` is as in `attention`; the other arguments are as in `Llama.forward`."""
        if self.begins:
            x = self.embed(x, positions)
        first, *others, last = self.segments.values()
        q, k, v = first(x)
        k_rows, v_rows = [], []
        by_first_pair = {first: block_angles(angles, first, self._pairs) for first, *_ in self._settings}
        for number, ((first_pair, *numbers), cache) in enumerate(zip(self._settings, caches, strict=True)):
            cos, sin = by_first_pair[first_pair] or (None, None)
            out, k, v = torch.ops.llama_pte.attention(q, k, v, cos, sin, self._slopes, *cache, start, *numbers)
            k_rows.append(k)
            v_rows.append(v)
            if number < len(others):
                q, k, v, x = others[number](x, out)
        if not self.ends:
            return Step(k_rows, v_rows, stream=last(x, out)[0])
        logits, hidden = last(x, out, select)
        return Step(k_rows, v_rows, logits, hidden)


def settings(attention: Attention, window: int | None) -> tuple[int | None, float, float, int]:
    """Returns where a block's rotary pairs begin in the tables, and the operator's scale, cap and window."""
    return attention.first_pair, attention.scale, attention.softcap or 0.0, window or 0
