"""ParallelSlices: some or all slices of a model, whose halves run in parallel; see `model.tensor_parallel`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.engine.executorch import Shard
from runtime.pte.metadata import STREAM, Metadata, MethodSpec, TensorSpec


class Group(Protocol):
    """The processes that together have all slices, in the slices' order.

    All processes must make the same calls in the same order.
    """

    def summed(self, tensor: Tensor) -> Tensor:
        """Returns the sum of all processes' tensors, float32 [B, L, D] each, contiguous; may overwrite `tensor`."""
        ...

    def gathered(self, tensor: Tensor) -> Tensor:
        """Returns all processes' tensors, float32 [B, R, v] each, contiguous, joined to [B, R, sum of v]."""
        ...


class Alone:
    """The group of a single process that has all slices."""

    def summed(self, tensor: Tensor) -> Tensor:
        """Returns `tensor`."""
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """Returns `tensor`."""
        return tensor


class ParallelSlices:
    """The consecutive slices of a model in this process, run together with the slices of other processes.

    Sums are computed by numpy, because PyTorch would start threads; see `runtime.engine.kv_cache.copied`.

    Attributes:
        bytes_loaded: bytes of matrices that are loaded again for each step; always 0.
    """

    bytes_loaded = 0

    def __init__(self, slices: Iterable[Shard], whole: Metadata, group: Group) -> None:
        """Loads the slices.

        Args:
            whole: their joined metadata.
            group: the processes that have the other slices.
        """
        self._slices = sorted(slices, key=lambda each: each.metadata.slice)
        self._halves = self._slices[0].metadata.methods
        self._caches = [spec.name for spec in whole.caches]
        self._vocab_size = whole.config.vocab_size
        self._group = group
        for each in self._slices:
            each.load()

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once, half after half, as `runtime.engine.program.Program.step` does.

        The outputs of a half stay valid until it runs again in the next step.
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
        """Returns the inputs of one slice, with only its own heads of the caches."""

        def own(cache: Tensor) -> Tensor:
            heads = len(cache) // len(self._slices)
            return cache[number * heads : (number + 1) * heads]

        return {**inputs, **{name: own(inputs[name]) for name in self._caches}}

    def _whole(self, spec: TensorSpec, parts: Sequence[Tensor]) -> Tensor:
        """Joins an output of all slices: rows along the heads, logits along the vocabulary; others are equal in all."""
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
