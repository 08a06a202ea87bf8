"""KVCache: one session's keys and values, allocated once; its bookkeeping is integers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from export.metadata import MethodSpec
from model.errors import InputError


class KVCache:
    """Every layer's keys and values for `capacity` positions, of which the first `position` are filled.

    A step is planned, run and committed: `plan` answers whether the new rows fit, the graph reads the buffers in place,
    and `commit` writes the rows that it returned. Rows past `position` weigh nothing: the mask hides them.

    Attributes:
        buffers: the graph's inputs by name, k_cache.0 ... v_cache.n, each [B*K, T, Dh] float32.
        capacity: T, in positions.
        position: positions filled so far.
    """

    def __init__(self, method: MethodSpec) -> None:
        specs = {spec.name: spec for spec in method.inputs if spec.name.startswith(("k_cache.", "v_cache."))}
        self.buffers: dict[str, Tensor] = {
            name: torch.zeros([size for size in spec.shape if isinstance(size, int)], dtype=getattr(torch, spec.dtype))
            for name, spec in specs.items()
        }
        self._rows = [(buffer, name.replace("cache", "rows")) for name, buffer in self.buffers.items()]
        self.capacity = next(iter(self.buffers.values())).shape[1]
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
            buffer[:, start:end] = outputs[name][:, :length]
        self.position = end

    def rewind(self, position: int) -> None:
        """Forgets everything from `position` on.

        Raises:
            InputError: position is outside [0, self.position].
        """
        if not 0 <= position <= self.position:
            raise InputError(f"cannot rewind to position {position}: the cache holds positions 0 to {self.position}")
        self.position = position
