"""Rounding of matrices to blocks: scales and offsets with the least squared error, and the bytes they become.

GGUF's layouts are those of ggml (ggml-common.h); gguf.quants.dequantize reads them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.block_linear import BLOCK_FORMS, BlockForm

_STEPS = torch.linspace(0.7, 1.15, 19)
"""Scales that are tried for a block, relative to the one that covers its largest weight."""

_FINE_STEPS = torch.linspace(0.97, 1.01, 11)
"""The same for codes of 8 bits."""


@dataclass(frozen=True)
class Scales:
    """Scales of some blocks, in the precision in which they are stored: a weight is d * value + m.

    Attributes:
        form: format of the blocks.
        head: what a block stores in front of its codes, uint8 [.., head bytes].
        d: float32 [.., parts], for consecutive parts of a block.
        m: like d; None if the format has no offsets.
    """

    form: BlockForm
    head: Tensor
    d: Tensor
    m: Tensor | None = None

    def nearest(self, w: Tensor) -> Tensor:
        """Returns the codes, uint8 [.., columns], whose values are nearest to weights [.., columns]."""
        parts = torch.unflatten(w, -1, (self.d.shape[-1], -1))
        m = None if self.m is None else self.m.unsqueeze(-1)
        return _nearest_codes(parts, self.d.unsqueeze(-1), m, self.form).flatten(-2)

    def round(self, w: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Returns the codes and values [..] nearest to the weights [..] of one column."""
        part = column * self.d.shape[-1] // self.form.columns
        d, m = self.d[..., part], None if self.m is None else self.m[..., part]
        codes = _nearest_codes(w, d, m, self.form)
        return codes, _values(codes, d, m, self.form)


def blocks_of(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Rounds a matrix [N, K] float32 to blocks, uint8 [N, row bytes], of a kind in
    `model.block_linear.BLOCK_FORMS`.

    Args:
        importance: [K], factors of the columns' squared errors; None if all are equal.
    """
    form = BLOCK_FORMS[kind]
    blocks = torch.unflatten(weight, 1, (-1, form.columns))
    h = torch.ones(weight.shape[1]) if importance is None else importance
    scales = fitted(blocks, h.view(-1, form.columns), kind)
    return packed(scales.head, scales.nearest(blocks), kind)


def fitted(w: Tensor, h: Tensor, kind: str) -> Scales:
    """Returns the scales of blocks w [.., columns] for the least sum of h * error^2.

    Args:
        h: positive factors that can be broadcast to w.
    """
    form = BLOCK_FORMS[kind]
    return _FITTED[form.head](w, h.expand_as(w), form)


def packed(head: Tensor, codes: Tensor, kind: str) -> Tensor:
    """Returns the bytes [N, row bytes] of heads [N, blocks, head bytes] and codes [N, blocks, columns]."""
    return _PACKED.get(kind, _packed)(head, codes, BLOCK_FORMS[kind]).flatten(1)


def _nearest_codes(w: Tensor, d: Tensor, m: Tensor | None, form: BlockForm) -> Tensor:
    if m is not None:
        return _affine_codes(w, d, m, (1 << form.bits) - 1).to(torch.uint8)
    x = w / _safe(d)
    if form.table:
        return _lookup(form.table)[_halves(x)]
    return (_nearest(x, form) + form.zero).to(torch.int8).view(torch.uint8)


def _values(codes: Tensor, d: Tensor, m: Tensor | None, form: BlockForm) -> Tensor:
    """Returns the weights that codes stand for."""
    if form.table:
        return d * torch.tensor(form.table, dtype=torch.float32)[codes.int()]
    signed = codes.view(torch.int8) if form.bits == 8 else codes
    return d * (signed.float() - form.zero) + (0 if m is None else m)


def _limits(form: BlockForm) -> tuple[int, int]:
    """Returns the least and the greatest value of a form without offsets."""
    if form.table:
        return min(form.table), max(form.table)
    half = 1 << (form.bits - 1)
    return -half + (form.bits == 8), half - 1


def _nearest(x: Tensor, form: BlockForm) -> Tensor:
    """Returns the values, of a form without offsets, that are nearest to x."""
    if form.table:
        return torch.tensor(form.table, dtype=torch.float32)[_lookup(form.table).long()][_halves(x)]
    return x.round().clamp(*_limits(form))


@functools.cache
def _lookup(table: tuple[int, ...]) -> Tensor:
    """Returns the code, uint8, of the value nearest to x, by `_halves(x)`: values are integers, so that the limits
    between them are multiples of 1/2.
    """
    values, codes = torch.sort(torch.tensor(table, dtype=torch.float32), stable=True)
    x = (torch.arange(-256, 256) + 0.5) / 2
    return codes[torch.bucketize(x, (values[1:] + values[:-1]) / 2)].to(torch.uint8)


def _halves(x: Tensor) -> Tensor:
    """Returns the number of the half-open interval of length 1/2 in which x lies, from -128 on."""
    return (2 * x).floor().clamp(-256, 255).int() + 256


def _affine_codes(w: Tensor, d: Tensor, m: Tensor, most: int) -> Tensor:
    """Returns the codes from 0 to `most` for w = d * code + m."""
    return ((w - m) / _safe(d)).round().clamp(0, most)


def _safe(d: Tensor) -> Tensor:
    return torch.where(d == 0, 1.0, d)


def fitted_scale(w: Tensor, h: Tensor, form: BlockForm, positive: bool = False) -> Tensor:
    """Returns the scale d [..] of blocks [.., n], for w = d * value: of those tried, the one with the least sum of
    h * error^2.

    Args:
        positive: whether d must be positive.
    """
    low, high = _limits(form)
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    limits = {high, -low if positive else low} if low != -high else {high}
    extreme = extreme.abs() if positive else extreme
    best, least, hw = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf), h * w
    for step in _FINE_STEPS if form.bits == 8 else _STEPS:
        for limit in sorted(limits):
            d = extreme / limit * step
            found = _nearest(w / _safe(d), form)
            squares = (h * found.square()).sum(-1, keepdim=True)
            d = torch.where(squares > 0, (hw * found).sum(-1, keepdim=True) / squares.clamp(min=1e-30), d)
            error = (h * (w - d * found).square()).sum(-1, keepdim=True)
            best, least = torch.where(error < least, d, best), torch.minimum(error, least)
    return best.squeeze(-1)


def _fitted_with_offset(w: Tensor, h: Tensor, most: int, below: bool) -> tuple[Tensor, Tensor]:
    """Returns the scale and offset of each block [.., n], for w = d * code + m and codes from 0 to `most`.

    Args:
        below: whether m must not be above 0.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    low = low.clamp(max=0) if below else low
    best = (high - low) / most, low
    least = torch.full_like(low, torch.inf)
    h = h / h.sum(-1, keepdim=True)
    mean = (h * w).sum(-1, keepdim=True)
    for step in _STEPS:
        d = (high - low) / most * step
        m = low + (1 - step) / 2 * (high - low) if not below else low * (1 + step) / 2
        for _ in range(2):
            codes = _affine_codes(w, d, m, most)
            mean_code = (h * codes).sum(-1, keepdim=True)
            spread = (h * (codes - mean_code).square()).sum(-1, keepdim=True)
            slope = (h * (codes - mean_code) * (w - mean)).sum(-1, keepdim=True) / spread.clamp(min=1e-30)
            d = torch.where(spread > 0, slope, d)
            m = mean - d * mean_code
            if below:
                squares = (h * codes.square()).sum(-1, keepdim=True).clamp(min=1e-30)
                d = torch.where(m > 0, (h * w * codes).sum(-1, keepdim=True) / squares, d)
                m = m.clamp(max=0)
        error = (h * (w - d * _affine_codes(w, d, m, most) - m).square()).sum(-1, keepdim=True)
        best = torch.where(error < least, d, best[0]), torch.where(error < least, m, best[1])
        least = torch.minimum(error, least)
    return best[0].squeeze(-1), best[1].squeeze(-1)


def _bytes(x: Tensor) -> Tensor:
    """Returns the bytes of numbers [.., n] as uint8 [.., bytes]."""
    return x.contiguous().view(torch.uint8)


def _with_scale(w: Tensor, h: Tensor, form: BlockForm) -> Scales:
    d = fitted_scale(w, h, form).half().unsqueeze(-1)
    return Scales(form, _bytes(d), d.float())


def _with_scale_and_offset(w: Tensor, h: Tensor, form: BlockForm) -> Scales:
    head = torch.stack(_fitted_with_offset(w, h, (1 << form.bits) - 1, below=False), dim=-1).half()
    d, m = head.float().unsqueeze(-2).unbind(-1)
    return Scales(form, _bytes(head), d, m)


def _with_exponent(w: Tensor, h: Tensor, form: BlockForm) -> Scales:
    largest = w.abs().amax(-1, keepdim=True) / _limits(form)[1]
    exponent = torch.where(largest > 0, largest, 1.0).log2().ceil()
    tries = torch.stack([exponent - 1, exponent])
    errors = [(h * (w - d * _nearest(w / d, form)).square()).sum(-1, keepdim=True) for d in tries.exp2()]
    zero = 127 + form.fraction_bits
    exponent = torch.where(errors[0] < errors[1], tries[0], tries[1]).clamp(-126, 254 - zero)
    return Scales(form, (exponent + zero).to(torch.uint8), exponent.exp2())


def _with_six_bits(w: Tensor, h: Tensor, form: BlockForm) -> Scales:
    w, h = (torch.unflatten(each, -1, (8, 32)) for each in (w, h))
    d, m = _fitted_with_offset(w, h, (1 << form.bits) - 1, below=True)
    whole = torch.stack((d.amax(-1), -m.amin(-1)), dim=-1) / 63
    whole = whole.clamp(min=0).half()
    D, M = whole.float().unsqueeze(-2).unbind(-1)
    s, t = ((each / _safe(top)).round().clamp(0, 63).to(torch.uint8) for each, top in ((d, D), (-m, M)))
    low = torch.cat((s[..., :4] | s[..., 4:] >> 4 << 6, t[..., :4] | t[..., 4:] >> 4 << 6), dim=-1)
    high = s[..., 4:] & 15 | t[..., 4:] << 4
    return Scales(form, torch.cat((_bytes(whole), low, high), dim=-1), D * s, -M * t)


def _with_bytes(w: Tensor, h: Tensor, form: BlockForm) -> Scales:
    w, h = (torch.unflatten(each, -1, (16, 16)) for each in (w, h))
    d = fitted_scale(w, h, form)
    largest = d.gather(-1, d.abs().argmax(-1, keepdim=True))
    D = (largest / -128).half()
    s = (d / _safe(D.float())).round().clamp(-128, 127)
    return Scales(form, torch.cat((_bytes(D), _bytes(s.to(torch.int8))), dim=-1), D.float() * s)


_FITTED: dict[str, Callable[[Tensor, Tensor, BlockForm], Scales]] = {
    "scale": _with_scale,
    "scale_and_offset": _with_scale_and_offset,
    "exponent": _with_exponent,
    "six_bits": _with_six_bits,
    "bytes": _with_bytes,
}


def _packed(head: Tensor, codes: Tensor, form: BlockForm) -> Tensor:
    """Returns blocks of 32 columns: the head, the bits above the fourth of consecutive columns, and the low bits, of
    which column i stands beside column i + 16.
    """
    codes = codes.to(torch.uint8)
    if form.bits == 8:
        return torch.cat((head, codes), dim=-1)
    low = codes & 15
    planes = [head, low[..., :16] | low[..., 16:] << 4]
    if form.bits > 4:
        shifts = torch.arange(0, 8, form.bits - 4, dtype=torch.uint8)
        bits = torch.unflatten(codes >> 4, -1, (-1, len(shifts))) << shifts
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
