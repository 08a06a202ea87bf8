"""Linear layers whose weights are in blocks, as operators; this module defines what they compute in PyTorch.

cpp_runner/src/linear/kernel.inc implements them for devices. A matrix is laid out in groups of 16 rows, whose
numbers stand side by side (cpp_runner/src/linear/blocks.h). They stay what they are in GGUF, and take as many bytes.
MXFP6 and MXINT8, which GGUF does not have, are microscaling formats of the Open Compute Project (OCP MX specification
1.0) with elements of E2M3 and INT8. A block of theirs is laid out like those of GGUF's types with 32 columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

GROUP = 16
_COLUMNS = 32
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_E2M3 = tuple(i if i < 8 else (8 + i % 8) << (i // 8 - 1) for i in range(32))
_MXFP6 = (*_E2M3, *(-number for number in _E2M3))


@dataclass(frozen=True)
class BlockForm:
    """A format of weights in blocks: a weight is d * code + m.

    Attributes:
        head: what a block stores in front of its codes.
            scale: float16 d.
            scale_and_offset: float16 d and m.
            exponent: a byte e, and d is 2^(e - 127 - fraction_bits).
            six_bits: float16 D and M, and 12 bytes with 6-bit s and t of 8 blocks: d = D * s, m = -M * t.
            bytes: float16 D, and int8 s of 16 half blocks: d = D * s.
        bits: of a code.
        zero: subtracted from a code.
        table: the numbers that codes stand for.
        fraction_bits: fractional bits of the numbers that codes stand for, with an exponent as head.
    """

    head: Literal["scale", "scale_and_offset", "exponent", "six_bits", "bytes"]
    bits: int
    zero: int = 0
    table: tuple[int, ...] = ()
    fraction_bits: int = 0

    @property
    def head_bytes(self) -> int:
        """Number of bytes of a head, for each row."""
        return {"scale": 2, "scale_and_offset": 4, "exponent": 1, "six_bits": 16, "bytes": 18}[self.head]

    @property
    def halves(self) -> int:
        """Number of bytes of a head that are float16."""
        return {"scale": 2, "scale_and_offset": 4, "exponent": 0, "six_bits": 4, "bytes": 2}[self.head]

    @property
    def columns(self) -> int:
        """Number of columns of a block, of which a matrix has a multiple."""
        return 8 * _COLUMNS if self.head in ("six_bits", "bytes") else _COLUMNS

    @property
    def block_bytes(self) -> int:
        """Number of bytes of a block, for each row."""
        return self.head_bytes + self.columns * self.bits // 8


BLOCK_FORMS = {
    "Q8_0": BlockForm("scale", 8),
    "Q4_0": BlockForm("scale", 4, 8),
    "Q4_1": BlockForm("scale_and_offset", 4),
    "Q5_0": BlockForm("scale", 5, 16),
    "Q5_1": BlockForm("scale_and_offset", 5),
    "Q4_K": BlockForm("six_bits", 4),
    "Q5_K": BlockForm("six_bits", 5),
    "Q6_K": BlockForm("bytes", 6, 32),
    "IQ4_NL": BlockForm("scale", 4, table=_IQ4_NL),
    "MXFP4": BlockForm("exponent", 4, table=_MXFP4, fraction_bits=1),
    "MXFP6": BlockForm("exponent", 6, table=_MXFP6, fraction_bits=3),
    "MXINT8": BlockForm("exponent", 8, fraction_bits=6),
}
"""All formats, by GGUF's names where it has them."""


def relaid(blocks: Tensor, kind: str) -> Tensor:
    """Brings GGUF's blocks of a matrix, uint8 [N, row bytes], into groups, uint8 [groups, group bytes]."""
    form = BLOCK_FORMS[kind]
    N = blocks.shape[0]
    padded = torch.nn.functional.pad(blocks, (0, 0, 0, -N % GROUP))
    head, codes = _taken_apart(padded.view(len(padded), -1, form.block_bytes), form)
    groups, count = len(padded) // GROUP, head.shape[1]
    head = head.view(groups, GROUP, count, form.head_bytes).transpose(1, 2)
    halves = head[..., : form.halves].view(groups, count, GROUP, form.halves // 2, 2).transpose(2, 3)
    singles = head[..., form.halves :].transpose(2, 3)
    # [groups, blocks, parts of 32 columns, vectors of 64 bytes, rows, columns]
    codes = codes.view(groups, GROUP, count, -1, 8, 4).permute(0, 2, 3, 4, 1, 5)
    low, high = codes & 15, codes >> 4
    pieces = [codes] if form.bits == 8 else [low[:, :, :, :4] | low[:, :, :, 4:] << 4]
    if form.bits == 5:
        pieces.append((high << _along(3, range(8))).sum(3, keepdim=True, dtype=torch.uint8))
    if form.bits == 6:
        pairs = torch.unflatten(high, 3, (2, 4)) << _along(4, (0, 2, 4, 6), 7)
        pieces.append(pairs.sum(4, dtype=torch.uint8))
    planes = torch.cat([piece.flatten(3) for piece in pieces], dim=3)
    return torch.cat([piece.flatten(2) for piece in (halves, singles, planes)], dim=2).flatten(1)


def _along(dim: int, values: range | tuple[int, ...], dims: int = 6) -> Tensor:
    """Returns bytes along one of `dims` dimensions."""
    return torch.tensor(list(values), dtype=torch.uint8).view([-1 if i == dim else 1 for i in range(dims)])


def _taken_apart(blocks: Tensor, form: BlockForm) -> tuple[Tensor, Tensor]:
    """Takes GGUF's blocks [.., block bytes] apart into heads [.., head bytes] and codes [.., columns], all uint8."""
    if form.head == "bytes":  # Q6_K has its head at the end, with D last
        low, high, scales, scale = torch.split(blocks, [128, 64, 16, 2], dim=-1)
        nibbles = torch.unflatten(low, -1, (2, 1, 64)) >> _along(1, (0, 4), 3) & 15
        pairs = torch.unflatten(high, -1, (2, 1, 32)) >> _along(1, (0, 2, 4, 6), 3) & 3
        return torch.cat((scale, scales), dim=-1), (nibbles.flatten(-3) | pairs.flatten(-3) << 4)
    head, rest = blocks[..., : form.head_bytes], blocks[..., form.head_bytes :]
    if form.bits == 8:
        return head, rest
    high_bytes = form.columns // 8 * (form.bits - 4)
    high, low = rest[..., :high_bytes], rest[..., high_bytes:]
    codes = (torch.unflatten(low, -1, (-1, 1, min(32, low.shape[-1]))) >> _along(1, (0, 4), 3) & 15).flatten(-3)
    if high_bytes == 0:
        return head, codes
    if form.columns > _COLUMNS:  # a byte has a bit of each block of 32 columns
        bits = high.unsqueeze(-2) >> _along(0, range(8), 2)
    else:  # of consecutive columns
        bits = high.unsqueeze(-1) >> _along(1, range(0, 8, form.bits - 4), 2)
    return head, codes | (bits & (1 << form.bits - 4) - 1).flatten(-2) << 4


def _codes(planes: Tensor, form: BlockForm) -> Tensor:
    """Returns the codes [.., 8 vectors, 64] of planes [.., bytes], uint8."""
    planes = torch.unflatten(planes, -1, (-1, 64))
    if form.bits == 8:
        return planes
    codes = torch.cat((planes[..., :4, :] & 15, planes[..., :4, :] >> 4), dim=-2)
    if form.bits == 5:
        codes = codes | (planes[..., 4:, :] >> _along(0, range(8), 2) & 1) << 4
    if form.bits == 6:
        pairs = planes[..., 4:, None, :] >> _along(1, (0, 2, 4, 6), 3) & 3
        codes = codes | pairs.flatten(-3, -2) << 4
    return codes


def _signed(codes: Tensor, form: BlockForm) -> Tensor:
    """Returns the numbers that codes stand for, int8."""
    if form.table:
        return torch.tensor(form.table, dtype=torch.int8)[codes.long()]
    return codes.view(torch.int8) - form.zero


def _scales(head: Tensor, form: BlockForm, rows: int = GROUP) -> tuple[Tensor, Tensor | None]:
    """Returns d and, if the format has it, m of heads of so many rows, [groups, blocks, ..]: float32 [groups, blocks,
    parts, rows].
    """
    if form.head == "exponent":
        e = torch.unflatten(head, -1, (-1, rows)).int()
        power = torch.where(e < 2, e + 1 << 21, e - 1 << 23).view(torch.float32)  # 2^(e - 128)
        return power * 2 ** (1 - form.fraction_bits), None
    halves, singles = head[..., : form.halves * rows], head[..., form.halves * rows :]
    first = torch.unflatten(halves.contiguous().view(torch.float16).float(), -1, (-1, rows))
    singles = torch.unflatten(singles, -1, (-1, rows)) if singles.shape[-1] else singles
    if form.head == "bytes":
        return first * singles.view(torch.int8).float(), None
    if form.head == "six_bits":
        a, b, c = torch.split(singles, 4, dim=-2)
        s = torch.cat((a & 63, c & 15 | a >> 2 & 48), dim=-2)
        t = torch.cat((b & 63, c >> 4 | b >> 2 & 48), dim=-2)
        return first[..., :1, :] * s.float(), -(first[..., 1:, :] * t.float())
    return first[..., :1, :], first[..., 1:, :] if form.head == "scale_and_offset" else None


def _unpacked(groups: Tensor, form: BlockForm) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the codes [N, K], d [N, K / 32 or K / 16] and m [N, K / 32], as float32."""
    blocks = torch.unflatten(groups, 1, (-1, GROUP * form.block_bytes))
    head, planes = blocks[..., : GROUP * form.head_bytes], blocks[..., GROUP * form.head_bytes :]
    codes = _signed(_codes(torch.unflatten(planes, -1, (form.columns // _COLUMNS, -1)), form), form)
    codes = torch.unflatten(codes, -1, (GROUP, 4))
    d, m = _scales(head, form)

    def by_row(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)

    return codes.permute(0, 4, 1, 2, 3, 5).flatten(2).flatten(0, 1).float(), by_row(d), None if m is None else by_row(m)


def _numbers(codes: Tensor, d: Tensor, m: Tensor | None) -> Tensor:
    """Returns codes * d, and then + m if there is one: [N, K], like the codes."""
    x = codes.view(len(codes), d.shape[1], -1) * d.unsqueeze(-1)
    if m is not None:
        x = x.view(len(codes), m.shape[1], -1) + m.unsqueeze(-1)
    return x.view(codes.shape)


def numbers(blocks: Tensor, kind: str) -> Tensor:
    """Returns the numbers that GGUF's blocks of a matrix stand for, uint8 [N, row bytes] to float32 [N, K]."""
    form = BLOCK_FORMS[kind]
    head, codes = _taken_apart(blocks.view(len(blocks), -1, form.block_bytes), form)
    d, m = _scales(head, form, rows=1)
    codes = _signed(codes.contiguous(), form).float()
    return _numbers(codes.flatten(1), d.flatten(1), None if m is None else m.flatten(1))


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each 32 numbers of rows [L, K] to 8 bits.

    Returns:
        The codes [L, K / 32, 32] and the scales [L, K / 32], as float32.
    """
    x = torch.unflatten(x, -1, (-1, _COLUMNS))
    scale = x.abs().amax(-1) / 127
    codes = torch.where(scale.unsqueeze(-1) == 0, 0, (x / scale.unsqueeze(-1)).round().clamp(-127, 127))
    return codes, scale


_LIBRARY = torch.library.Library("llama_pte", "FRAGMENT")  # type: ignore[no-untyped-call]
_MATRIX = "Tensor weight{0}, Tensor? bias{0}, str kind{0}, int rows{0}"
_EXPERTS = "Tensor x, Tensor[] weights, Tensor chosen, str kind, int rows"
_ROWS = "Tensor weight, Tensor tokens, str kind, int columns"
for _schema in (
    f"expert_linear({_EXPERTS}) -> Tensor",
    f"expert_linear.out({_EXPERTS}, *, Tensor(a!) out) -> Tensor(a!)",
    f"block_rows({_ROWS}) -> Tensor",
    f"block_rows.out({_ROWS}, *, Tensor(a!) out) -> Tensor(a!)",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, rows: int) -> Tensor:
    """Multiplies by a matrix in blocks. Every operation is rounded as in the kernel (linear.h), so that the results
    are bitwise equal.

    Args:
        x: [.., K] float32.
        weight: groups of rows, see `relaid`, flat.
        bias: [N], or None.
        kind: a key of `BLOCK_FORMS`.
        rows: N.
    """
    codes, d, m = _unpacked(weight.view(-(-rows // GROUP), -1), BLOCK_FORMS[kind])
    by_x, scale = rounded(x.view(-1, x.shape[-1]))
    parts = d.shape[1] // scale.shape[1]  # 2 in a format with two scales for 32 columns, else 1
    width = _COLUMNS // parts
    out = x.new_zeros(len(by_x), len(codes))
    for b in range(scale.shape[1]):
        products = []
        for i in range(parts):
            # Sums of integers below 2^24, which are exact in float32 in any order.
            of_matrix = codes[:, b * _COLUMNS + i * width :][:, :width]
            products.append(by_x[:, b, i * width :][:, :width] @ of_matrix.T * d[:, b * parts + i])
        if m is not None:
            products.append(by_x[:, b].sum(1, keepdim=True) * m[:, b])
        total = products[0] + products[1] if len(products) > 1 else products[0]
        out = out + total * scale[:, b, None]
    out = out[:, :rows]
    return (out if bias is None else out + bias).view(*x.shape[:-1], rows)


MOST_MATRICES = 3
"""Number of matrices that one operator multiplies by. linear2 and linear3 take what calls of `linear` with the same x
take, one after another, and return their results.
"""


def _linears(x: Tensor, *matrices: Any) -> tuple[Tensor, ...]:
    """Multiplies x by several matrices, each given by four arguments of `linear`."""
    return tuple(linear(x, *matrices[i : i + 4]) for i in range(0, len(matrices), 4))


def _shapes(x: Tensor, *matrices: Any) -> Any:
    made = tuple(x.new_empty(*x.shape[:-1], rows) for rows in matrices[3::4])
    return made if len(made) > 1 else made[0]


def _out_shapes(*_: object, **outs: Tensor) -> Any:
    return tuple(outs.values()) if len(outs) > 1 else outs["out"]


def _define(count: int) -> None:
    """Defines linear, linear2 or linear3, which multiplies by `count` matrices."""
    name = f"linear{count if count > 1 else ''}"
    numbers, letters = ("", "2", "3")[:count], "abc"[:count]
    given = ", ".join(["Tensor x", *(_MATRIX.format(number) for number in numbers)])
    outs = ", ".join(f"Tensor({letter}!) out{number}" for letter, number in zip(letters, numbers, strict=True))
    made, written = ", ".join(["Tensor"] * count), ", ".join(f"Tensor({letter}!)" for letter in letters)
    if count > 1:
        made, written = f"({made})", f"({written})"
    _LIBRARY.define(f"{name}({given}) -> {made}")  # type: ignore[no-untyped-call]
    _LIBRARY.define(f"{name}.out({given}, *, {outs}) -> {written}")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, _linears if count > 1 else linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"llama_pte::{name}", _shapes)
    torch.library.register_fake(f"llama_pte::{name}.out", _out_shapes)


for _count in range(1, MOST_MATRICES + 1):
    _define(_count)


@torch.library.impl(_LIBRARY, "expert_linear", "CompositeExplicitAutograd")
def expert_linear(x: Tensor, weights: Sequence[Tensor], chosen: Tensor, kind: str, rows: int) -> Tensor:
    """Multiplies rows by the matrices of the experts chosen for them. Each product is that of `linear`.

    Args:
        x: [.., K] float32, or [.., k, K] with one row for each chosen expert.
        weights: matrix of each expert: groups of rows, see `relaid`, flat.
        chosen: [.., k] int64, numbers of experts.
        kind: a key of `BLOCK_FORMS`.
        rows: N.

    Returns:
        The products [.., k, N].
    """
    if x.dim() == chosen.dim():
        x = x.unsqueeze(-2).expand(*chosen.shape, x.shape[-1])
    out = x.new_empty(*chosen.shape, rows)
    for number, weight in enumerate(weights):
        if len(given := x[chosen == number]):
            out[chosen == number] = linear(given, weight, None, kind, rows)
    return out


@torch.library.register_fake("llama_pte::expert_linear")  # type: ignore[untyped-decorator]
def _expert_shape(x: Tensor, weights: Sequence[Tensor], chosen: Tensor, kind: str, rows: int) -> Tensor:
    return x.new_empty(*chosen.shape, rows)


@torch.library.register_fake("llama_pte::expert_linear.out")  # type: ignore[untyped-decorator]
def _expert_out_shape(*_: object, out: Tensor) -> Tensor:
    return out


@torch.library.impl(_LIBRARY, "block_rows", "CompositeExplicitAutograd")
def block_rows(weight: Tensor, tokens: Tensor, kind: str, columns: int) -> Tensor:
    """Looks up rows of a matrix in blocks.

    Args:
        weight: groups of rows, see `relaid`, flat.
        tokens: [..] int64, numbers of rows.
        kind: a key of `BLOCK_FORMS`.
        columns: K.

    Returns:
        The rows [.., K] float32: codes * d, and then + m if the form has it.
    """
    form, ids = BLOCK_FORMS[kind], tokens.flatten()
    groups = weight.view(-1, GROUP * columns // form.columns * form.block_bytes)
    rows = torch.unflatten(_numbers(*_unpacked(groups[ids // GROUP], form)), 0, (-1, GROUP))
    return rows[torch.arange(len(ids)), ids % GROUP].view(*tokens.shape, columns)


@torch.library.register_fake("llama_pte::block_rows")  # type: ignore[untyped-decorator]
def _rows_shape(weight: Tensor, tokens: Tensor, kind: str, columns: int) -> Tensor:
    return weight.new_empty((*tokens.shape, columns), dtype=torch.float32)


@torch.library.register_fake("llama_pte::block_rows.out")  # type: ignore[untyped-decorator]
def _rows_out_shape(*_: object, out: Tensor) -> Tensor:
    return out
