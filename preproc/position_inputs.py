"""All inputs of a graph that depend on the position, by the names under which a file's methods ask for them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.alibi import alibi_slopes
from model.config import ModelConfig
from preproc import mask, rope


def names(config: ModelConfig, fused: bool = False, span: range | None = None) -> list[str]:
    """Which of them a model takes, or the blocks `span` of it: positions at its beginning where they are learned, cos
    and sin where they rotate, a mask for the blocks that see everything, and a local_mask for those that see a window.
    Where attention is fused, start takes the masks' place.
    """
    span = range(config.n_layers) if span is None else span
    masks = {mask_name(config, layer) for layer in span}
    learned = ["positions"] if span.start == 0 else []
    by_kind = {"learned": learned, "rope": ["cos", "sin"], "alibi": []}
    return by_kind[config.positions] + (["start"] if fused else sorted(masks, reverse=True))


def mask_name(config: ModelConfig, layer: int) -> str:
    """The mask that a block takes."""
    return "local_mask" if config.is_local(layer) else "mask"


@dataclass(frozen=True)
class Positions:
    """What they are made from.

    Attributes:
        cos, sin: [T, P] float32 each, see `preproc.rope.tables`; of no use where nothing is rotated.
        slopes: [H] float32, see `model.alibi.alibi_slopes`; empty where distance is not weighed.
        window: positions that a local block sees.
        length: T, the positions that a text may have.
    """

    cos: Tensor
    sin: Tensor
    slopes: Tensor
    window: int | None
    length: int

    @staticmethod
    def of(config: ModelConfig, length: int) -> "Positions":
        """Those of a model, for texts of up to `length` tokens."""
        slopes = alibi_slopes(config) if config.positions == "alibi" else torch.zeros(0)
        return Positions(*rope.tables(config, length), slopes, config.sliding_window, length)

    def make(self, name: str, position: int, length: int, capacity: int) -> Tensor:
        """One input, for `length` tokens that start at `position`. Padding past T repeats the last position.

        Args:
            name: one of `names`.
            capacity: of the cache that a mask goes with.

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
    """Those of one method, allocated once and moved from step to step.

    Attributes:
        tensors: the inputs by name, with the shapes that `Positions.make` says.
    """

    def __init__(self, positions: Positions, widths: Mapping[str, int], length: int) -> None:
        """Lays them out for position 0.

        Args:
            widths: the last size of each that the method takes, by name: a mask's says how long the caches are.
            length: tokens of a step, at most.
        """
        self._place = (0, length)
        self._tables = dict[str, tuple[np.ndarray, np.ndarray]]()  # name -> the rows of all positions, the input's own
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
        """Makes them those of `length` tokens that start at `position`; rows behind these are any."""
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
