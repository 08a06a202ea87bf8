"""Format, the interface of all storage formats of a matrix."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn


class Share(Protocol):
    """The part of a tensor that belongs to one slice of a model, see `export.lowering.slices`."""

    def __call__(self, whole: Tensor, padding: float = 0.0) -> Tensor:
        """Returns the slice's part of a tensor that is divided along the same axis as its matrix, in proportion.

        Args:
            padding: value of elements beyond the end of the tensor.
        """
        ...


class Grid(Protocol):
    """The values to which the weights of a group of columns can be rounded."""

    def round(self, w: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Returns the codes and the values nearest to the weights [N] of one of the group's columns."""
        ...


class Format(ABC):
    """The storage format of a matrix [rows, columns], and everything that is specific to it.

    A stored matrix is a tensor, whose content only its format knows. Subclasses are frozen dataclasses. Their fields
    are part of a file's provenance, and equal fields mean equal formats.

    Attributes:
        kind: name of the format in provenance, in `export.weights.formats.registry.FORMATS` and in the rows of
            `export.lowering.backends.BACKENDS`.
        bits: bits per weight; None for float32.
        group_size: number of consecutive weights in a row that are stored together; None if a row can be divided
            anywhere.
        rounds_inputs: whether linear layers round their inputs to 8 bits.
        by_operator: whether linear layers and embeddings are operators that take the stored matrix as an argument.
        can_calibrate: whether `export.quality.gptq` can round to this format.
        swaps_pairs: whether a linear layer that uses the embedding's bytes takes its inputs in swapped pairs.
        max_ppl_increase: relative increase of perplexity that verification allows by default; None for a format that
            loses nothing.
    """

    kind: ClassVar[str]
    bits: int | None
    group_size: int | None
    rounds_inputs: ClassVar[bool] = False
    by_operator: ClassVar[bool] = False
    can_calibrate: ClassVar[bool] = False

    @property
    def swaps_pairs(self) -> bool:
        return False

    @property
    def max_ppl_increase(self) -> float | None:
        return None

    @property
    def fallback(self) -> "Format":
        """Format of matrices that need more precision, or whose rows are not whole groups."""
        return self

    def fits(self, columns: int) -> bool:
        """Returns whether a row consists of whole groups."""
        return columns % (self.group_size or 1) == 0

    def fitting(self, columns: int) -> "Format":
        """Returns the first of this format and its fallbacks in which rows of `columns` are whole groups."""
        return self if self.fits(columns) else self.fallback.fitting(columns)

    def to_json(self) -> dict[str, Any]:
        """Returns the format as JSON types, for `export.weights.formats.registry.parse`."""
        return {"kind": self.kind} | asdict(self)  # type: ignore[call-overload]  # a dataclass

    @abstractmethod
    def nbytes(self, rows: int, columns: int) -> int:
        """Returns the size of a stored matrix, in bytes."""

    @abstractmethod
    def stored(self, weight: Tensor, rounding: str) -> Tensor:
        """Returns a matrix [rows, columns] in this format.

        Args:
            rounding: rounding method, one of `export.weights.formats.integer.ROUNDINGS`.
        """

    @abstractmethod
    def random(self, shape: Sequence[int]) -> Tensor:
        """Returns a random stored matrix."""

    @abstractmethod
    def linear(self, stored: Tensor, bias: Tensor | None, width: int | None = None) -> nn.Module:
        """Returns a linear layer, with the stored matrix as its parameter `weight`.

        In an export, its graph is what a backend or an operator runs. In eager mode, it has the same arithmetic up to
        float rounding.

        Args:
            width: number of consecutive inputs that are rounded together; None for all.
        """

    @abstractmethod
    def embedding(self, stored: Tensor, columns: int) -> nn.Module:
        """Returns an embedding, which maps tokens [B, L], int64, to rows [B, L, D].

        Args:
            stored: the stored matrix [V, D].
            columns: D.
        """

    @abstractmethod
    def parts(self, stored: Tensor) -> list[tuple[str, Tensor]]:
        """Returns the data that a lowered linear layer refers to by name, as pairs of key prefix and tensor."""

    @abstractmethod
    def share(self, stored: Tensor, axis: int, take: Share) -> Tensor:
        """Returns one slice's part of a stored matrix.

        Args:
            axis: 0 if rows are divided, 1 if columns are.
            take: applied to each tensor that is divided.
        """


class Quantised(Format):
    """A format whose matrices can be rounded column by column, see `export.quality.gptq`."""

    can_calibrate: ClassVar[bool] = True

    @abstractmethod
    def grid(self, w: Tensor, h: Tensor) -> Grid:
        """Returns the grid for a group of columns w [N, columns] with the least sum of h * error^2.

        Args:
            h: positive factors [columns].
        """

    @abstractmethod
    def gathered(self, grids: Sequence[Grid], codes: Tensor) -> list[Tensor]:
        """Returns the data of a matrix, given the grids of its groups and its codes [N, K], as plain tensors with a row
        for each row.
        """

    @abstractmethod
    def restored(self, *tensors: Tensor) -> Tensor:
        """Returns the stored matrix whose data `gathered` has returned."""

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """Returns inputs [..., K] of a linear layer as it rounds them."""
