"""KVCache: one session's keys and values, allocated once; its bookkeeping is integers."""

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError
from runtime.pte.metadata import MethodSpec, TensorSpec


def copied(tensor: Tensor) -> Tensor:
    """By numpy: PyTorch would start threads for it, which then spin for a while where ExecuTorch's are to compute."""
    return torch.from_numpy(tensor.numpy().copy())


class KVCache:
    """Every layer's keys and values for `capacity` positions, of which the first `position` are filled.

    A position p lies in slot p % slots of a buffer. One with fewer slots than `capacity`, of a block that sees only a
    window, is thereby a ring of the latest rows.

    A step is planned, run and committed: `plan` answers whether the new rows fit, the graph reads the buffers in place,
    and `commit` writes the rows that it returned. Rows past `position` weigh nothing: the graph does not look at them.

    Attributes:
        buffers: the graph's inputs by name, k_cache.0 ... v_cache.n, each [B*K, slots, W], rows as in
            `model.kv_row_format`; none where the methods take no cache.
        specs: what the methods say of each.
        capacity: positions that a text may have.
        position: positions filled so far.
    """

    def __init__(self, method: MethodSpec, capacity: int) -> None:
        self.specs = {spec.name: spec for spec in method.caches}
        shapes = {name: spec.sizes(0) for name, spec in self.specs.items()}
        (dtype,) = {spec.dtype for spec in self.specs.values()} or {"float32"}
        self.buffers = dict[str, Tensor]()
        self._groups = list[tuple[Tensor, list[str]]]()  # those of one shape lie in one tensor, and are written at once
        for shape in dict.fromkeys(shapes.values()):
            names = [name for name in shapes if shapes[name] == shape]
            group = torch.from_numpy(np.zeros((len(names), *shape), dtype))  # by numpy, which touches no memory yet
            self.buffers |= dict(zip(names, group, strict=True))
            self._groups.append((group, [self.specs[name].rows for name in names]))
        self.capacity = capacity
        self.position = 0
        self._ring = min((shape[1] for shape in shapes.values()), default=capacity)
        self._first = 0  # the earliest position that a ring still holds

    def lane(self, number: int, of: int) -> "KVCache":
        """The cache of one text among `of` that a step extends at once: in this one's memory, at its own position."""
        other = copy.copy(self)

        def part(rows: int) -> slice:
            return slice(number * rows // of, (number + 1) * rows // of)

        other.buffers = {name: buffer[part(len(buffer))] for name, buffer in self.buffers.items()}
        other._groups = [(group[:, part(group.shape[1])], names) for group, names in self._groups]
        return other

    def filled_bytes(self, position: int) -> int:
        """Bytes of the rows of a text of `position` tokens: what a step reads there."""
        return sum(b.nbytes // b.shape[1] * min(position, b.shape[1]) for b in self.buffers.values())

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
        """Appends the first `length` rows of k_rows.* and v_rows.*, [B*K, L, W] each; what follows them is padding."""
        start = self.plan(length)
        end = start + length
        for group, names in self._groups:
            slots = group.shape[2]
            buffers = group.numpy()  # whose slices cost a tenth of a tensor's
            rows = np.stack([outputs[name].numpy() for name in names])
            position = max(start, end - slots)
            while position < end:
                slot = position % slots
                count = min(end - position, slots - slot)
                first = position - start
                buffers[:, :, slot : slot + count] = rows[:, :, first : first + count]
                position += count
        self.position = end
        self._first = max(self._first, end - self._ring)

    def filled(self) -> list[np.ndarray]:
        """The part of each buffer that a text of `position` tokens may have written, [B*K, count, W]: a view."""

        def count(slots: int) -> int:
            wrapped = slots < self.capacity and self._first > 0
            return slots if wrapped else min(self.position, slots)

        return [buffer.numpy()[:, : count(buffer.shape[1])] for buffer in self.buffers.values()]

    @property
    def state(self) -> tuple[int, int]:
        """What says, with the buffers, what is cached."""
        return self.position, self._first

    def restore(self, state: tuple[int, int]) -> list[np.ndarray]:
        """Takes another cache's state over, and returns what it fills, which is to be written; see `filled`."""
        self.position, self._first = state
        return self.filled()

    def room(self, keep: int) -> int:
        """How many positions behind the first `keep` can be taken out by `slide`; fewer than 1 where a ring, which no
        longer holds the first, would see them then.
        """
        seen = self._ring - 1 if self._ring < self.capacity else 0
        return self.position - keep - seen

    def slide(self, keep: int, count: int, moved: Callable[[TensorSpec, np.ndarray], np.ndarray]) -> None:
        """Takes out `count` positions behind the first `keep`: what follows them moves to earlier ones.

        Args:
            count: at most `room`.
            moved: given a buffer's spec and rows [B*K, n, W], returns these as they are `count` positions earlier.
        """
        assert count <= self.room(keep), f"{count} positions cannot be taken out"
        for name, buffer in self.buffers.items():
            slots, rows = buffer.shape[1], buffer.numpy()
            positions = np.arange(max(keep + count, self.position - slots), self.position)
            rows[:, (positions - count) % slots] = moved(self.specs[name], rows[:, positions % slots])
        if self._first:
            self._first = max(keep + count, self.position - self._ring) - count
        self.position -= count

    def rewind(self, position: int) -> None:
        """Forgets everything from `position` on.

        Raises:
            InputError: position is outside [0, self.position], or a ring no longer holds what is seen from there.
        """
        if not 0 <= position <= self.position:
            raise InputError(f"cannot rewind to position {position}: the cache holds positions 0 to {self.position}")
        if position == 0:
            self._first = 0
        elif self._first > max(position - self._ring + 1, 0):
            raise InputError(
                f"cannot rewind to position {position}: the model sees {self._ring} positions at a time, and their "
                f"cache has been written over; rewind to {self._first + self._ring - 1} or later, or to 0"
            )
        self.position = position
