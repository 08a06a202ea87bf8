"""ParallelSlices: some of a model's slices, or all, whose halves run side by side; see `model.tensor_parallel`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.engine.executorch import Shard
from runtime.pte.metadata import STREAM, Metadata, MethodSpec, TensorSpec


class Group(Protocol):
    """The processes that together have all slices, in the order of these; each calls the same in the same order."""

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of what all give, of one shape: float32 [B, L, D], contiguous, which may be written over."""
        ...

    def gathered(self, tensor: Tensor) -> Tensor:
        """What all give, side by side: float32 [B, R, v] each, contiguous -> [B, R, sum of v]."""
        ...


class Alone:
    """The group of a process that has all slices."""

    def summed(self, tensor: Tensor) -> Tensor:
        """What it is given."""
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """What it is given."""
        return tensor


class ParallelSlices:
    """Slices that follow one another, in this process, and what it needs of the others.

    Sums are numpy's: PyTorch would start threads for them; see `runtime.engine.kv_cache.copied`.

    Attributes:
        bytes_loaded: of matrices that are loaded anew for each step: none.
    """

    bytes_loaded = 0

    def __init__(self, slices: Iterable[Shard], whole: Metadata, group: Group) -> None:
        """Loads them.

        Args:
            whole: what they carry together.
            group: of the processes that have the other slices.
        """
        self._slices = sorted(slices, key=lambda each: each.metadata.slice)
        self._halves = self._slices[0].metadata.methods
        self._caches = [spec.name for spec in whole.caches]
        self._vocab_size = whole.config.vocab_size
        self._group = group
        for each in self._slices:
            each.load()

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once, as `runtime.engine.program.Program.step` does, by its halves.

        What a half returns is good until it is run again, in the next step: each has results of its own.
        """
        parts = [self._share(inputs, number) for number in range(len(self._slices))]
        outputs, stream = dict[str, Tensor](), None
        for half in (each for each in self._halves if each.whole == method.name):
            found = [each.run(half.name, part) for each, part in zip(self._slices, parts, strict=True)]
            if STREAM in found[0]:
                added = self._group.summed(_sum([each.pop(STREAM) for each in found]))
                stream = added if stream is None else _sum([stream, added])
                for part in parts:
                    part[STREAM] = stream
            given = (spec for spec in half.outputs if spec.name != STREAM)
            outputs |= {spec.name: self._whole(spec, [each[spec.name] for each in found]) for spec in given}
        return outputs

    def _share(self, inputs: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """What one slice takes: of the caches, its own heads."""

        def own(cache: Tensor) -> Tensor:
            heads = len(cache) // len(self._slices)
            return cache[number * heads : (number + 1) * heads]

        return {**inputs, **{name: own(inputs[name]) for name in self._caches}}

    def _whole(self, spec: TensorSpec, parts: Sequence[Tensor]) -> Tensor:
        """An output of all slices: rows one slice's after another's, logits side by side, and the rest equal in all."""
        if spec.name == "logits":
            return self._group.gathered(_concatenate(parts, axis=-1))[..., : self._vocab_size]
        return _concatenate(parts, axis=0) if spec.is_rows else parts[0]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    whole = parts[0].numpy().copy()
    for part in parts[1:]:
        whole += part.numpy()
    return torch.from_numpy(whole)


def _concatenate(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.from_numpy(np.concatenate([part.numpy() for part in parts], axis))
