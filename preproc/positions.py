"""All inputs of a graph that depend on the position, by the names under which a file's methods ask for them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from preproc import mask, rope


def names(config: ModelConfig) -> list[str]:
    """Which of them a model takes: positions where they are learned, cos and sin where they rotate, a mask for the
    blocks that see everything, and a local_mask for those that see a window.
    """
    masks = {mask_name(config, layer) for layer in range(config.n_layers)}
    by_kind = {"learned": ["positions"], "rope": ["cos", "sin"], "alibi": []}
    return by_kind[config.positions] + sorted(masks, reverse=True)


def mask_name(config: ModelConfig, layer: int) -> str:
    """The mask that a block takes."""
    return "local_mask" if config.is_local(layer) else "mask"


@dataclass(frozen=True)
class Positions:
    """What they are made from.

    Attributes:
        cos, sin: [T, P] float32 each, see `preproc.rope.tables`; of no use where nothing is rotated.
        slopes: [H] float32, see `preproc.mask.alibi_slopes`; empty where distance is not weighed.
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
        slopes = mask.alibi_slopes(config) if config.positions == "alibi" else torch.zeros(0)
        return Positions(*rope.tables(config, length), slopes, config.sliding_window, length)

    def make(self, name: str, position: int, length: int, capacity: int) -> Tensor:
        """One input, for `length` tokens that start at `position`. Padding past T repeats the last position.

        Args:
            name: one of `names`.
            capacity: of the cache that a mask goes with.

        Returns:
            positions [1, length] int64; cos and sin [1, length, P]; masks [1 or H, length, capacity + length].
        """
        if name == "positions":
            return torch.arange(position, position + length).clamp(max=self.length - 1).unsqueeze(0)
        if name in ("cos", "sin"):
            return rope.slices((self.cos, self.sin), position, length)[name == "sin"]
        if len(self.slopes):
            return mask.alibi(position, length, capacity, self.slopes)
        return mask.causal(position, length, capacity, self.window if name == "local_mask" else None).unsqueeze(0)
