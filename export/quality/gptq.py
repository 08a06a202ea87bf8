"""GPTQ calibration (Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1): matrices are rounded by means
of their inputs on a text, and weights that are rounded later compensate for the errors of earlier ones.

torchao 0.18 has GPTQ only for CUDA, and not for the formats of `export.weights.formats.integer`.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from export.lowering.trace import step
from export.quality.perplexity import read_text, windows
from export.weights.formats.integer import Integer, hqq
from export.weights.formats.integer_layers import as_8_bits
from export.weights.rows import by_rows
from export.weights.scheme import CALIBRATED, Scheme
from export.weights.source import WeightSource, linear_layers, piece_names
from model.config import ModelConfig
from model.errors import InputError
from preproc.position_inputs import Positions, names
from preproc.tokenizer import Tokenizer

TOKENS = 4096
"""Number of tokens of a calibration text that are used."""

WINDOW = 256
"""Number of tokens in a window, within which they attend to each other. Attention is computed for all windows
at once.
"""

DAMPING = 0.1
"""Damping: the share of the inputs' mean square that is added to the diagonal of the Hessian. The paper uses 0.01,
which gives the same results on small models; a higher value is safer if a layer has more inputs than there are tokens.
"""

_COLUMNS_AT_ONCE = 128
"""Number of columns that are rounded before the error is applied to the remaining ones, if groups are not smaller."""

_ELEMENTS_AT_ONCE = 1 << 22
"""Number of elements of a matrix that are rounded at a time, enough for long columns."""


@dataclass(frozen=True)
class CalibrationText:
    """The text given by `--calibrate`."""

    path: Path
    text: str = field(repr=False)

    @staticmethod
    def of(path: Path) -> "CalibrationText":
        """Reads the text of a file.

        Raises:
            InputError: the file is not a text file.
        """
        return CalibrationText(path, read_text("--calibrate", path))

    @property
    def sha256(self) -> str:
        """SHA-256 of the text in UTF-8, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def check(self, scheme: Scheme) -> None:
        """Checks that calibration has an effect.

        Raises:
            InputError: no matrix of the scheme can be calibrated.
        """
        if not any(form.can_calibrate for form in (scheme.linear, scheme.head, *scheme.others.values())):
            raise InputError(
                f"--calibrate {self.path} needs layers in 8da4w or 8da8w, but these are not; give --quantize 8da4w as "
                "well, or leave it out"
            )

    def windows(self, tokenizer: Tokenizer | None, bos_id: int | None, max_seq_len: int) -> list[list[int]]:
        """Returns the first TOKENS tokens of the text in windows of equal length.

        Raises:
            InputError: there is no tokenizer, or the text has fewer than two tokens.
        """
        if tokenizer is None:
            raise InputError(f"--calibrate {self.path} needs a tokenizer; give --tokenizer FILE, or leave it out")
        ids = tokenizer.encode(self.text)
        given = [part[:-1] for part in windows(ids, bos_id, min(WINDOW, max_seq_len), TOKENS)]
        if not ids or not given:
            raise InputError(f"--calibrate {self.path} has fewer than two tokens; give a longer text")
        return [part for part in given if len(part) == len(given[0])]


@torch.no_grad()
def calibrate(source: WeightSource, texts: Sequence[Sequence[int]], max_seq_len: int, folder: Path) -> WeightSource:
    """Rounds the matrices block by block. The inputs of each block are computed by the blocks before it, whose matrices
    are already rounded.

    Args:
        source: source of the model, whose scheme has the rounding CALIBRATED.
        texts: token ids of texts of equal length.
        max_seq_len: length for which the rotary tables are made.
        folder: folder for the matrices, which is needed as long as the returned source is used.
    """
    assert source.scheme.rounding == CALIBRATED, source.scheme
    found = _Stored(folder, source)
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

    def __init__(self, folder: Path, source: WeightSource) -> None:
        self._folder, self._source, self._files = folder, source, dict[str, Path]()

    def save(self, piece: str, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Saves codes and scales of a piece's matrices, by name."""
        path = self._folder / f"{piece}.safetensors"
        parts = {f"{name}.codes": codes for name, (codes, _) in matrices.items()}
        save_file(parts | {f"{name}.scale": scale for name, (_, scale) in matrices.items()}, path)
        self._files |= dict.fromkeys(matrices, path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as tensors:
            codes, scale = tensors.get_tensor(f"{name}.codes"), tensors.get_tensor(f"{name}.scale")
        return _integer(self._source, name).from_codes(codes, scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _integer(source: WeightSource, name: str) -> Integer:
    form = source.format(name)
    assert isinstance(form, Integer), f"{name} is stored as {form}, which cannot be calibrated"
    return form


class _Piece(nn.Module):
    """Takes the place of a part of the model. It rounds the part's matrices for the inputs it receives, and does not
    keep them in memory.
    """

    def __init__(self, source: WeightSource, name: str, stored: _Stored) -> None:
        super().__init__()
        self.source, self.name, self.stored = source, name, stored
        self.found = dict[str, tuple[Tensor, Tensor]]()
        self.last: tuple[Tensor, Tensor] | None = None

    def round(self, name: str, bias: Tensor | None, x: Tensor) -> nn.Module:
        """Rounds a linear layer's matrix for its inputs [..., K], and returns the layer. Consecutive layers with the
        same inputs share their inverse root.
        """
        if self.last is None or self.last[0] is not x:
            self.last = None
            self.last = (x, inverse_root(as_8_bits(x)))
        weight = self.source.weight(name)
        form = _integer(self.source, name)
        self.found[name] = gptq(weight, self.last[1], form)
        return form.linear(form.from_codes(*self.found[name]), bias)

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
                made: nn.Module = _Rounding(functools.partial(self.round, name, layer.bias))
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
            self.round("head.output.weight", None, norm(x))
            self.finish()
        return x, x


class _Rounding(nn.Module):
    """A layer that is created when its inputs are known."""

    def __init__(self, make: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(x)(x)


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


def gptq(weight: Tensor, root: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of a matrix [N, K], given the `inverse_root` of its inputs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each column is little work, so threads would mostly wait
    try:
        codes, scale = by_rows(weight, lambda rows: _rounded(rows.float(), root, form), _ELEMENTS_AT_ONCE)
    finally:
        torch.set_num_threads(threads)
    return codes, scale


def _rounded(rows: Tensor, root: Tensor, form: Integer) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of some rows. They are transposed to [K, N], so that a column is contiguous. The scale
    of a group is computed when the group is reached, after the corrections for earlier errors.
    """
    left = rows.t().contiguous()
    codes, scales, most = torch.empty(left.shape, dtype=torch.int8), list[Tensor](), form.largest
    columns = form.group_size or _COLUMNS_AT_ONCE
    for start in range(0, len(left), columns):
        if form.group_size or not scales:
            scales.append(hqq(left[start : start + (form.group_size or len(left))].t().contiguous(), form)[1])
        here, rest = slice(start, start + columns), slice(start + columns, None)
        made, errors = _round_columns(left[here], root[here, here], scales[-1][:, 0], most)
        codes[here] = made
        left[rest].addmm_(root[here, rest].t(), errors, alpha=-1)
    return codes.t(), torch.cat(scales, dim=1)


def _round_columns(columns: Tensor, root: Tensor, scale: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Returns codes [C, N] of columns, and the errors [C, N] for which later columns compensate. Changes `columns` in
    place.
    """
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    steps, inverse = scale.float(), (1 / scale).float()  # inverse in the dtype of the scale, as in torchao
    for i, column in enumerate(columns):
        codes[i] = (column * inverse).round_().clamp_(-most, most - 1)
        errors[i] = (column - codes[i] * steps) / root[i, i]
        columns[i + 1 :].addr_(root[i, i + 1 :], errors[i], alpha=-1)
    return codes, errors
