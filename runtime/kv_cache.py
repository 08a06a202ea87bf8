"""KVCache: one session's keys and values, allocated once; its bookkeeping is integers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from export.metadata import MethodSpec
from model.errors import InputError


class KVCache:
    """Every layer's keys and values for `capacity` positions, of which the first `position` are filled.

    A position p lies in slot p % slots of a buffer. One with fewer slots than `capacity`, of a block that sees only a
    window, is thereby a ring of the latest rows.

    A step is planned, run and committed: `plan` answers whether the new rows fit, the graph reads the buffers in place,
    and `commit` writes the rows that it returned. Rows past `position` weigh nothing: the mask hides them.

    Attributes:
        buffers: the graph's inputs by name, k_cache.0 ... v_cache.n, each [B*K, slots, Dh] float32; none where the
            methods take no cache.
        capacity: positions that a text may have.
        position: positions filled so far.
    """

    def __init__(self, method: MethodSpec, capacity: int) -> None:
        specs = {spec.name: spec for spec in method.inputs if spec.name.startswith(("k_cache.", "v_cache."))}
        self.buffers: dict[str, Tensor] = {
            name: torch.zeros([size for size in spec.shape if isinstance(size, int)], dtype=getattr(torch, spec.dtype))
            for name, spec in specs.items()
        }
        self._rows = [(buffer, name.replace("cache", "rows")) for name, buffer in self.buffers.items()]
        self.capacity = capacity
        self.position = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def plan(self, length: int) -> int:
        """The position at which `length` new rows would start.

        Raises:
            InputError: they do not fit.
        """
        if length < 1 or self.position + length > self.capacity:
            raise InputError(
                f"{length} tokens do not fit behind the {self.position} in the cache, which holds {self.capacity}; "
                "shorten the prompt or export with a larger --max-seq-len"
            )
        return self.position

    def commit(self, outputs: Mapping[str, Tensor], length: int) -> None:
        """Appends the first `length` rows of k_rows.* and v_rows.*, [B*K, L, Dh] each; what follows them is padding."""
        start, end = self.plan(length), self.position + length
        for buffer, name in self._rows:
            slots = buffer.shape[1]
            if end <= slots:
                buffer[:, start:end] = outputs[name][:, :length]
            else:
                kept = torch.arange(max(start, end - slots), end)
                buffer[:, kept % slots] = outputs[name][:, kept - start]
        self.position = end

    def rewind(self, position: int) -> None:
        """Forgets everything from `position` on.

        Raises:
            InputError: position is outside [0, self.position], or a ring no longer holds what is seen from there.
        """
        if not 0 <= position <= self.position:
            raise InputError(f"cannot rewind to position {position}: the cache holds positions 0 to {self.position}")
        ring = min((buffer.shape[1] for buffer in self.buffers.values()), default=self.capacity)
        if 0 < position < self.position - 1 and self.position > ring:
            raise InputError(
                f"cannot rewind to position {position}: the model sees {ring} positions at a time, and their cache has "
                "been written over; rewind by one at most, or to 0"
            )
        self.position = position
