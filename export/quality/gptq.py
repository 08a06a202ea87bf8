"""Calibration: matrices are rounded by means of their inputs on a text.

Scales have the least squared error, in which a column counts as much as the mean square of its inputs. With GPTQ
(Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1), weights that are rounded later also compensate for
the errors of earlier ones.

torchao 0.18 has GPTQ only for CUDA, and not for the formats of `export.weights.formats.integer`.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from export.lowering.trace import step
from export.quality.perplexity import read_text, windows
from export.weights.formats.format import Grid, Quantised
from export.weights.rows import by_rows
from export.weights.scheme import CALIBRATIONS, GPTQ
from export.weights.source import WeightSource, linear_layers, piece_names
from model.config import ModelConfig
from model.errors import InputError
from preproc.position_inputs import Positions, names
from preproc.tokenizer import Tokenizer

TEXT = Path(__file__).with_name("calibration_text.txt")
"""The built-in text: short passages of several kinds and languages."""

TOKENS = 4096
"""Number of tokens of a calibration text that are used."""

WINDOW = 256
"""Number of tokens in a window, within which they attend to each other. Attention is computed for all windows
at once.
"""

DAMPING = 0.3
"""Damping: the share of the inputs' mean square that is added to the diagonal of the Hessian. The paper uses 0.01. A
higher value is better where a layer has about as many inputs as there are tokens, see tests/bench/NOTES.md.
"""

_COLUMNS_AT_ONCE = 128
"""Number of columns that are rounded before the error is applied to the remaining ones, if groups are not smaller."""

_ELEMENTS_AT_ONCE = 1 << 22
"""Number of elements of a matrix that are rounded at a time, enough for long columns."""


@dataclass(frozen=True)
class CalibrationText:
    """A text on which matrices are calibrated.

    Attributes:
        flag: the flag that asks for it, for messages.
        text: the text.
    """

    flag: str
    text: str = field(repr=False)

    @staticmethod
    def of(path: Path | None, rounding: str) -> "CalibrationText | None":
        """Returns the text of the file that `--calibrate` gives; without one, the built-in text for the roundings that
        need a text, and None for others.

        Raises:
            InputError: the file is not a text file.
        """
        if path is not None:
            return CalibrationText(f"--calibrate {path}", read_text("--calibrate", path))
        if rounding in CALIBRATIONS:
            return CalibrationText(f"--rounding {rounding}", TEXT.read_text(encoding="utf-8"))
        return None

    @property
    def sha256(self) -> str:
        """SHA-256 of the text in UTF-8, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def check(self, source: WeightSource) -> None:
        """Checks that calibration has an effect.

        Raises:
            InputError: no matrix of the model can be calibrated.
        """
        if not any(map(source.is_calibrated, source.matrices)):
            raise InputError(
                f"{self.flag} has no effect, because no matrix of a linear layer is rounded; give another "
                "--quantize, such as q4_0, or leave it out"
            )

    def windows(self, tokenizer: Tokenizer | None, bos_id: int | None, max_seq_len: int) -> list[list[int]]:
        """Returns the first TOKENS tokens of the text in windows of equal length.

        Raises:
            InputError: there is no tokenizer, or the text has fewer than two tokens.
        """
        if tokenizer is None:
            raise InputError(f"{self.flag} needs a tokenizer; give --tokenizer FILE, or leave it out")
        ids = tokenizer.encode(self.text)
        given = [part[:-1] for part in windows(ids, bos_id, min(WINDOW, max_seq_len), TOKENS)]
        if not ids or not given:
            raise InputError(f"{self.flag} has fewer than two tokens; give a longer text")
        return [part for part in given if len(part) == len(given[0])]


@torch.no_grad()
def calibrate(
    source: WeightSource,
    texts: Sequence[Sequence[int]],
    max_seq_len: int,
    folder: Path,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> WeightSource:
    """Rounds the matrices block by block. The inputs of each block are computed by the blocks before it, whose matrices
    are already rounded.

    Args:
        source: source of the model, whose scheme is calibrated.
        texts: token ids of texts of equal length.
        max_seq_len: length for which the rotary tables are made.
        folder: folder for the matrices, which is needed as long as the returned source is used.
        advance: receives the number of matrices rounded so far, and of all that are rounded.
    """
    assert source.scheme.is_calibrated, source.scheme
    found = _Stored(folder, source, advance)
    model = source.streamed()
    for name in piece_names(source.config):
        if name == "head" or name.startswith("layers."):
            model.set_submodule(name, (_Head if name == "head" else _Block)(source, name, found))
    step(model, _side_by_side(source.config, texts, max_seq_len))
    return source.with_calibrated(found)


def _side_by_side(config: ModelConfig, texts: Sequence[Sequence[int]], max_seq_len: int) -> dict[str, Tensor]:
    """Returns all inputs of `export.lowering.trace.step` for a batch of texts of equal length."""
    positions, length = Positions.of(config, max_seq_len), len(texts[0])
    inputs = {"tokens": torch.tensor(texts), "select": torch.zeros(0)}
    for name in names(config):
        made = positions.make(name, 0, length, capacity=0)
        inputs[name] = made.repeat(len(texts), *[1] * (made.dim() - 1))
    return inputs


class _Stored(Mapping[str, Tensor]):
    """Calibrated matrices in a folder, with one file for each piece of the model. They are memory-mapped at each
    access.
    """

    def __init__(self, folder: Path, source: WeightSource, advance: Callable[[int, int], None]) -> None:
        self._folder, self._source, self._files = folder, source, dict[str, Path]()
        self._advance, self._total = advance, sum(map(source.is_calibrated, source.matrices))

    def save(self, piece: str, matrices: Mapping[str, Sequence[Tensor]]) -> None:
        """Saves the data of a piece's matrices, by name, see `Quantised.gathered`."""
        path = self._folder / f"{piece}.safetensors"
        parts = {f"{name}.{i}": part.contiguous() for name, found in matrices.items() for i, part in enumerate(found)}
        save_file(parts, path)
        self._files |= dict.fromkeys(matrices, path)
        self._advance(len(self._files), self._total)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as tensors:
            parts = [tensors.get_tensor(key) for key in sorted(tensors.keys()) if key.rpartition(".")[0] == name]
        return _quantised(self._source, name).restored(*parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _quantised(source: WeightSource, name: str) -> Quantised:
    form = source.format(name)
    assert isinstance(form, Quantised), f"{name} is stored as {form}, which cannot be calibrated"
    return form


class _Piece(nn.Module):
    """Takes the place of a part of the model. It rounds the part's matrices for the inputs it receives, and does not
    keep them in memory.
    """

    def __init__(self, source: WeightSource, name: str, stored: _Stored) -> None:
        super().__init__()
        self.source, self.name, self.stored = source, name, stored
        self.found = dict[str, list[Tensor]]()
        self.last: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None

    def round(self, name: str, x: Tensor, with_values: bool = True) -> tuple[Tensor, Tensor]:
        """Rounds a linear layer's matrix for its inputs [..., K], and returns the inputs as the layer rounds them and,
        if wanted, the matrix [N, K], in float32. Consecutive layers with the same inputs share what is computed of
        these.
        """
        form = _quantised(self.source, name)
        if self.last is None or self.last[0] is not x:
            self.last = None
            inputs = form.rounded(x)
            root = inverse_root(inputs) if self.source.scheme.rounding == GPTQ else None
            self.last = (x, inputs, root, importance(inputs))
        _, inputs, root, h = self.last
        values, *self.found[name] = gptq(self.source.weight(name), root, h, form, with_values)
        return inputs, values

    def finish(self) -> None:
        """Saves the rounded matrices."""
        self.stored.save(self.name, self.found)
        self.found, self.last = {}, None


class _Block(_Piece):
    def forward(self, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the block. The rows for the caches are not used, and are returned empty."""
        block = self.source.frame(self.name)
        for path, layer in linear_layers(block):
            name = f"{self.name}.{path}.weight"
            if self.source.is_calibrated(name):
                made: nn.Module = _Rounding(functools.partial(self.round, name), layer.bias)
            else:
                made = self.source.format(name).linear(self.source.stored(name), layer.bias)
            block.set_submodule(path, made)
        x, k, v = block(*arguments)
        self.finish()
        return x, k[:0], v[:0]


class _Head(_Piece):
    def forward(self, x: Tensor, select: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds the head's matrix. Logits are not used, so the input is returned instead."""
        if self.source.is_calibrated("head.output.weight"):
            norm = self.source.frame("head").get_submodule("norm")
            self.round("head.output.weight", norm(x), with_values=False)
            self.finish()
        return x, x


class _Rounding(nn.Module):
    """A layer whose matrix is rounded when its inputs are known."""

    bias: Tensor | None

    def __init__(self, round_for: Callable[[Tensor], tuple[Tensor, Tensor]], bias: Tensor | None) -> None:
        super().__init__()
        self.round_for = round_for
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        inputs, matrix = self.round_for(x)
        return F.linear(inputs, matrix, self.bias)


def importance(x: Tensor) -> Tensor:
    """Returns factors for the squared errors of columns, [K] with a mean of about 1, for inputs X, [..., K]: the second
    moments of the inputs. A column without inputs has a small factor.
    """
    moments = x.reshape(-1, x.shape[-1]).square().mean(0)
    mean = moments.mean()
    return moments / mean + 1e-4 if mean > 0 else torch.ones_like(moments)


def inverse_root(x: Tensor) -> Tensor:
    """Returns the upper triangular U with U^T U = (X^T X + damping)^-1, [K, K], for inputs X, [..., K].

    With rows and columns reversed, X^T X = L L^T gives U = L^-1, which takes one factorisation instead of the paper's
    three.
    """
    x = x.reshape(-1, x.shape[-1])
    hessian = x.t() @ x
    damping = DAMPING * hessian.diagonal().mean()
    hessian.diagonal().add_(damping if damping > 0 else 1.0)
    hessian = hessian.flip(0, 1)
    lower, inverse = torch.linalg.cholesky(hessian, out=hessian), torch.eye(len(hessian))
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del hessian, lower
    return inverse.flip(0, 1)


def gptq(weight: Tensor, root: Tensor | None, h: Tensor, form: Quantised, with_values: bool = True) -> list[Tensor]:
    """Rounds a matrix [N, K].

    Args:
        root: the `inverse_root` of its inputs; None to round every column without regard to the others.
        h: the `importance` of its inputs.

    Returns:
        The values to which it was rounded, [N, K] float32, or [N, 0] if they are not wanted, and the matrix's data, see
        `Quantised.gathered`.
    """

    def made(rows: Tensor) -> list[Tensor]:
        values, *data = _rounded(rows.float(), root, h, form)
        return [values if with_values else values[:, :0], *data]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each column is little work, so threads would mostly wait
    try:
        return by_rows(weight, made, _ELEMENTS_AT_ONCE)
    finally:
        torch.set_num_threads(threads)


def _rounded(rows: Tensor, root: Tensor | None, h: Tensor, form: Quantised) -> list[Tensor]:
    """Returns the values and the data of some rows. They are transposed to [K, N], so that a column is contiguous. The
    grid of a group is computed when the group is reached, after the corrections for earlier errors.
    """
    left, values, grids, found = rows.t().contiguous(), torch.empty(rows.t().shape), list[Grid](), list[Tensor]()
    columns = form.group_size or _COLUMNS_AT_ONCE
    for start in range(0, len(left), columns):
        if form.group_size or not grids:
            group = slice(start, start + (form.group_size or len(left)))
            grids.append(form.grid(left[group].t().contiguous(), h[group]))
        here, rest = slice(start, start + columns), slice(start + columns, None)
        within = None if root is None else root[here, here]
        codes, errors = _round_columns(left[here], within, grids[-1], values[here])
        found.append(codes)
        if root is not None:
            left[rest].addmm_(root[here, rest].t(), errors, alpha=-1)
    return [values.t(), *form.gathered(grids, torch.cat(found).t())]


def _round_columns(columns: Tensor, root: Tensor | None, grid: Grid, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes [C, N] of columns, and the errors [C, N] for which later columns compensate. Changes `columns` in
    place, and writes the values of the codes into `values`.
    """
    codes, errors = list[Tensor](), torch.zeros_like(columns)
    for i, column in enumerate(columns):
        code, values[i] = grid.round(column, i)
        codes.append(code)
        if root is not None:
            errors[i] = (column - values[i]) / root[i, i]
            columns[i + 1 :].addr_(root[i, i + 1 :], errors[i], alpha=-1)
    return torch.stack(codes), errors
