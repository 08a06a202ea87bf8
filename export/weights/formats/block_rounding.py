"""Rounding of matrices to GGUF's blocks: scales and offsets with the least squared error, and the bytes they become.

GGUF's layouts are those of ggml (ggml-common.h); gguf.quants.dequantize reads them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.block_linear import BLOCK_FORMS, BlockForm

_STEPS = torch.linspace(0.7, 1.15, 19)
"""Scales that are tried for a block, relative to the one that covers its largest weight."""


def blocks_of(weight: Tensor, kind: str) -> Tensor:
    """Rounds a matrix [N, K] float32 to blocks, uint8 [N, row bytes], of a kind in
    `model.block_linear.BLOCK_FORMS`.
    """
    form = BLOCK_FORMS[kind]
    head, codes = _HEADS[form.head](torch.unflatten(weight, 1, (-1, form.columns)), form)
    return _PACKED.get(kind, _packed)(head, codes, form).flatten(1)


def _codebook(form: BlockForm) -> tuple[Tensor, Tensor]:
    """Returns the values of a form's codes in ascending order, and the code of each."""
    if form.table:
        return torch.sort(torch.tensor(form.table, dtype=torch.float32), stable=True)
    half = 1 << (form.bits - 1)
    codes = torch.arange(-half + (form.bits == 8), half, dtype=torch.float32)
    return codes, codes + form.zero


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """Returns the index of the nearest of ascending values."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def _affine_codes(w: Tensor, d: Tensor, m: Tensor, most: int) -> Tensor:
    """Returns the codes from 0 to `most` for w = d * code + m."""
    return ((w - m) / _safe(d)).round().clamp(0, most)


def _safe(d: Tensor) -> Tensor:
    return torch.where(d == 0, 1.0, d)


def _fitted(w: Tensor, values: Tensor) -> Tensor:
    """Returns the scale d of each block [.., n], for w = d * value, with the least squared error of those tried."""
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    for step in _STEPS:
        for limit in (values[0], values[-1]):
            d = extreme / limit * step
            found = values[_nearest(w / _safe(d), values)]
            squares = found.square().sum(-1, keepdim=True)
            d = torch.where(squares > 0, (w * found).sum(-1, keepdim=True) / squares.clamp(min=1e-30), d)
            error = (w - d * found).square().sum(-1, keepdim=True)
            best, least = torch.where(error < least, d, best), torch.minimum(error, least)
    return best.squeeze(-1)


def _fitted_with_offset(w: Tensor, most: int, below: bool) -> tuple[Tensor, Tensor]:
    """Returns the scale and offset of each block [.., n], for w = d * code + m and codes from 0 to `most`.

    Args:
        below: whether m must not be above 0.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    low = low.clamp(max=0) if below else low
    best = (high - low) / most, low
    least = torch.full_like(low, torch.inf)
    mean = w.sum(-1, keepdim=True) / w.shape[-1]
    for step in _STEPS:
        d = (high - low) / most * step
        m = low + (1 - step) / 2 * (high - low) if not below else low * (1 + step) / 2
        for _ in range(2):
            codes = _affine_codes(w, d, m, most)
            mean_code = codes.sum(-1, keepdim=True) / w.shape[-1]
            spread = (codes - mean_code).square().sum(-1, keepdim=True)
            slope = ((codes - mean_code) * (w - mean)).sum(-1, keepdim=True) / spread.clamp(min=1e-30)
            d = torch.where(spread > 0, slope, d)
            m = mean - d * mean_code
            if below:
                squares = codes.square().sum(-1, keepdim=True).clamp(min=1e-30)
                d = torch.where(m > 0, (w * codes).sum(-1, keepdim=True) / squares, d)
                m = m.clamp(max=0)
        error = (w - d * _affine_codes(w, d, m, most) - m).square().sum(-1, keepdim=True)
        best = torch.where(error < least, d, best[0]), torch.where(error < least, m, best[1])
        least = torch.minimum(error, least)
    return best[0].squeeze(-1), best[1].squeeze(-1)


def _bytes(x: Tensor) -> Tensor:
    """Returns the bytes of numbers [.., n] as uint8 [.., bytes]."""
    return x.contiguous().view(torch.uint8)


def _with_scale(w: Tensor, form: BlockForm) -> tuple[Tensor, Tensor]:
    values, codes = _codebook(form)
    d = _fitted(w, values).half()
    found = _nearest(w / _safe(d.float()).unsqueeze(-1), values)
    return _bytes(d.unsqueeze(-1)), codes[found].to(torch.int16)


def _with_scale_and_offset(w: Tensor, form: BlockForm) -> tuple[Tensor, Tensor]:
    most = (1 << form.bits) - 1
    head = torch.stack(_fitted_with_offset(w, most, below=False), dim=-1).half()
    d, m = head.float().unsqueeze(-2).unbind(-1)
    return _bytes(head), _affine_codes(w, d, m, most).to(torch.int16)


def _with_exponent(w: Tensor, form: BlockForm) -> tuple[Tensor, Tensor]:
    values, codes = _codebook(form)
    largest = w.abs().amax(-1, keepdim=True) / values[-1]
    exponent = torch.where(largest > 0, largest, 1.0).log2().ceil()
    tries = torch.stack([exponent - 1, exponent])
    d = tries.exp2()
    errors = torch.stack([(w - each * values[_nearest(w / each, values)]).square().sum(-1) for each in d])
    exponent = torch.where(errors[0] < errors[1], tries[0].squeeze(-1), tries[1].squeeze(-1)).clamp(-126, 126)
    found = _nearest(w / exponent.exp2().unsqueeze(-1), values)
    return (exponent + 128).to(torch.uint8).unsqueeze(-1), codes[found].to(torch.int16)


def _with_six_bits(w: Tensor, form: BlockForm) -> tuple[Tensor, Tensor]:
    most = (1 << form.bits) - 1
    w = torch.unflatten(w, -1, (8, 32))
    d, m = _fitted_with_offset(w, most, below=True)
    whole = torch.stack((d.amax(-1), -m.amin(-1)), dim=-1) / 63
    whole = whole.clamp(min=0).half()
    D, M = whole.float().unsqueeze(-2).unbind(-1)
    s, t = ((each / _safe(top)).round().clamp(0, 63).to(torch.uint8) for each, top in ((d, D), (-m, M)))
    d, m = (D * s).unsqueeze(-1), -(M * t).unsqueeze(-1)
    codes = _affine_codes(w, d, m, most).to(torch.int16).flatten(-2)
    low = torch.cat((s[..., :4] | s[..., 4:] >> 4 << 6, t[..., :4] | t[..., 4:] >> 4 << 6), dim=-1)
    high = s[..., 4:] & 15 | t[..., 4:] << 4
    return torch.cat((_bytes(whole), low, high), dim=-1), codes


def _with_bytes(w: Tensor, form: BlockForm) -> tuple[Tensor, Tensor]:
    values, codes = _codebook(form)
    w = torch.unflatten(w, -1, (16, 16))
    d = _fitted(w, values)
    largest = d.gather(-1, d.abs().argmax(-1, keepdim=True))
    D = (largest / -128).half()
    s = (d / _safe(D.float())).round().clamp(-128, 127)
    found = _nearest(w / _safe(D.float() * s).unsqueeze(-1), values)
    return torch.cat((_bytes(D), _bytes(s.to(torch.int8))), dim=-1), codes[found].to(torch.int16).flatten(-2)


_HEADS: dict[str, Callable[[Tensor, BlockForm], tuple[Tensor, Tensor]]] = {
    "scale": _with_scale,
    "scale_and_offset": _with_scale_and_offset,
    "exponent": _with_exponent,
    "six_bits": _with_six_bits,
    "bytes": _with_bytes,
}
"""Return what a block stores in front of its codes, uint8 [.., head bytes], and the codes, int16 [.., columns]."""


def _packed(head: Tensor, codes: Tensor, form: BlockForm) -> Tensor:
    """Returns blocks of 32 columns: the head, the fifth bits of consecutive columns, and the low bits, of which
    column i stands beside column i + 16.
    """
    codes = codes.to(torch.uint8)
    if form.bits == 8:
        return torch.cat((head, codes), dim=-1)
    low = codes & 15
    planes = [head, low[..., :16] | low[..., 16:] << 4]
    if form.bits == 5:
        bits = torch.unflatten(codes >> 4, -1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
        planes.insert(1, bits.sum(-1, dtype=torch.uint8))
    return torch.cat(planes, dim=-1)


def _packed_k(head: Tensor, codes: Tensor, form: BlockForm) -> Tensor:
    """Returns blocks of Q4_K and Q5_K, in which column i stands beside column i + 32."""
    parts = torch.unflatten(codes.to(torch.uint8), -1, (8, 32))
    low = torch.unflatten(parts & 15, -2, (4, 2))
    planes = [head, (low[..., 0, :] | low[..., 1, :] << 4).flatten(-2)]
    if form.bits == 5:
        bits = (parts >> 4) << torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
        planes.insert(1, bits.sum(-2, dtype=torch.uint8))
    return torch.cat(planes, dim=-1)


def _packed_6(head: Tensor, codes: Tensor, _: BlockForm) -> Tensor:
    """Returns blocks of Q6_K, whose head stands at the end with D last."""
    halves = torch.unflatten(codes.to(torch.uint8), -1, (2, 4, 32))
    low = torch.unflatten(halves & 15, -2, (2, 2)).flatten(-2)
    high = (halves >> 4) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8).unsqueeze(-1)
    planes = (low[..., 0, :] | low[..., 1, :] << 4).flatten(-2), high.sum(-2, dtype=torch.uint8).flatten(-2)
    return torch.cat((*planes, head[..., 2:], head[..., :2]), dim=-1)


_PACKED: dict[str, Callable[[Tensor, Tensor, BlockForm], Tensor]] = {
    "Q4_K": _packed_k,
    "Q5_K": _packed_k,
    "Q6_K": _packed_6,
}
