"""The graph inputs that depend on the position, under the names that an exported method uses for them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.alibi import alibi_slopes
from model.config import ModelConfig
from preproc import mask, rope


def names(config: ModelConfig, fused: bool = False, span: range | None = None) -> list[str]:
    """Returns the names of the position inputs of a model, or of the blocks `span`.

    The inputs are positions for learned embeddings, if the first block is included; cos and sin for rotary embedding; a
    mask for blocks without a sliding window, and a local_mask for blocks with one. With fused attention, start replaces
    the masks.
    """
    span = range(config.n_layers) if span is None else span
    masks = {mask_name(config, layer) for layer in span}
    learned = ["positions"] if span.start == 0 else []
    by_kind = {"learned": learned, "rope": ["cos", "sin"], "alibi": []}
    return by_kind[config.positions] + (["start"] if fused else sorted(masks, reverse=True))


def mask_name(config: ModelConfig, layer: int) -> str:
    """Returns the name of the mask that a block takes."""
    return "local_mask" if config.is_local(layer) else "mask"


@dataclass(frozen=True)
class Positions:
    """The tables from which position inputs are made.

    Attributes:
        cos, sin: [T, P] float32 each, see `preproc.rope.tables`; unused in a model without rotary embedding.
        slopes: [H] float32, see `model.alibi.alibi_slopes`; empty in a model without ALiBi.
        window: number of positions that a local block attends to.
        length: T, the maximum number of positions in a text.
    """

    cos: Tensor
    sin: Tensor
    slopes: Tensor
    window: int | None
    length: int

    @staticmethod
    def of(config: ModelConfig, length: int) -> "Positions":
        """Computes the tables of a model for texts of up to `length` tokens."""
        slopes = alibi_slopes(config) if config.positions == "alibi" else torch.zeros(0)
        return Positions(*rope.tables(config, length), slopes, config.sliding_window, length)

    def make(self, name: str, position: int, length: int, capacity: int) -> Tensor:
        """Returns one input for `length` tokens that start at `position`. Padding beyond T repeats the last position.

        Args:
            name: one of `names`.
            capacity: number of slots in the cache that a mask is for.

        Returns:
            positions [1, length] and start [1], int64; cos and sin [1, length, P]; masks [1 or H, length, capacity +
            length].
        """
        if name == "start":
            return torch.tensor([position])
        if name == "positions":
            return torch.arange(position, position + length).clamp(max=self.length - 1).unsqueeze(0)
        if name in ("cos", "sin"):
            return rope.slices((self.cos, self.sin), position, length)[name == "sin"]
        window = self.window if name == "local_mask" else None
        if len(self.slopes):
            return mask.alibi(position, length, capacity, self.slopes, window)
        return mask.causal(position, length, capacity, window).unsqueeze(0)


class PositionInputs:
    """The position inputs of one method, allocated once and updated at each step.

    Attributes:
        tensors: the inputs by name, with the shapes given in `Positions.make`.
    """

    def __init__(self, positions: Positions, widths: Mapping[str, int], length: int) -> None:
        """Allocates the inputs for position 0.

        Args:
            widths: maps the name of each input of the method to its last dimension, which determines the cache length
                for a mask.
            length: maximum number of tokens in a step.
        """
        self._place = (0, length)
        self._tables = dict[str, tuple[np.ndarray, np.ndarray]]()  # name -> the rows of all positions, the input's rows
        self._masks = list[mask.CausalMask]()
        self._start = np.zeros(1, dtype=np.int64)
        self.tensors = dict[str, Tensor]()
        for name, width in widths.items():
            if name == "start":
                self.tensors[name] = torch.from_numpy(self._start)
            elif name in ("positions", "cos", "sin"):
                self.tensors[name] = positions.make(name, 0, length, 0)
                table = {"positions": torch.arange(positions.length), "cos": positions.cos, "sin": positions.sin}[name]
                self._tables[name] = (table.numpy(), self.tensors[name].numpy()[0])
            else:
                window = positions.window if name == "local_mask" else None
                self._masks.append(mask.CausalMask(length, width - length, window, positions.slopes))
                self.tensors[name] = self._masks[-1].values

    def move(self, position: int, length: int) -> None:
        """Updates the inputs for `length` tokens that start at `position`; rows after those tokens are undefined."""
        if (position, length) == self._place:
            return
        self._place = (position, length)
        self._start[0] = position
        for table, rows in self._tables.values():
            count = min(length, len(table) - position)
            rows[:count] = table[position : position + count]
            rows[count:length] = table[-1]
        for each in self._masks:
            each.move(position)
