"""KVCache: the keys and values of one session, allocated once."""

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from model.errors import InputError
from runtime.pte.metadata import MethodSpec, TensorSpec


def copied(tensor: Tensor) -> Tensor:
    """Returns a copy, made by numpy: PyTorch would start threads, whose busy waiting slows down ExecuTorch's."""
    return torch.from_numpy(tensor.numpy().copy())


class KVCache:
    """The keys and values of every layer for `capacity` positions, of which the first `position` are filled.

    Position p is stored in slot p % slots of a buffer. A block with sliding-window attention has fewer slots than
    `capacity`, so its buffer is a ring of the latest rows.

    A step has three parts: `plan` checks that the new rows fit, the graph reads the buffers in place, and `commit`
    writes the rows that the graph returned. The graph ignores rows from `position` on.

    Attributes:
        buffers: the graph's inputs by name, k_cache.0 ... v_cache.n, each [B*K, slots, W], rows as in
            `model.kv_row_format`; empty if the methods take no cache.
        specs: the spec of each buffer, by name.
        capacity: maximum number of positions in a text.
        position: number of positions filled so far.
    """

    def __init__(self, method: MethodSpec, capacity: int) -> None:
        self.specs = {spec.name: spec for spec in method.caches}
        shapes = {name: spec.sizes(0) for name, spec in self.specs.items()}
        (dtype,) = {spec.dtype for spec in self.specs.values()} or {"float32"}
        self.buffers = dict[str, Tensor]()
        self._groups = list[tuple[Tensor, list[str]]]()  # buffers of one shape share a tensor and are written at once
        for shape in dict.fromkeys(shapes.values()):
            names = [name for name in shapes if shapes[name] == shape]
            group = torch.from_numpy(np.zeros((len(names), *shape), dtype))  # numpy's zeros touch no memory yet
            self.buffers |= dict(zip(names, group, strict=True))
            self._groups.append((group, [self.specs[name].rows for name in names]))
        self.capacity = capacity
        self.position = 0
        self._ring = min((shape[1] for shape in shapes.values()), default=capacity)
        self._first = 0  # the earliest position that the rings still hold

    def lane(self, number: int, of: int) -> "KVCache":
        """Returns the cache of one of `of` texts that a step extends together.

        It shares this cache's memory and has its own position.
        """
        other = copy.copy(self)

        def part(rows: int) -> slice:
            return slice(number * rows // of, (number + 1) * rows // of)

        other.buffers = {name: buffer[part(len(buffer))] for name, buffer in self.buffers.items()}
        other._groups = [(group[:, part(group.shape[1])], names) for group, names in self._groups]
        return other

    def filled_bytes(self, position: int) -> int:
        """Returns the bytes of the rows of a text of `position` tokens, which a step reads."""
        return sum(b.nbytes // b.shape[1] * min(position, b.shape[1]) for b in self.buffers.values())

    def plan(self, length: int) -> int:
        """Returns the position at which `length` new rows would start.

        Raises:
            InputError: the rows do not fit.
        """
        if length < 1 or self.position + length > self.capacity:
            raise InputError(
                f"{length} tokens do not fit after the {self.position} in the cache, which holds {self.capacity}; "
                "shorten the prompt or export with a larger --max-seq-len"
            )
        return self.position

    def commit(self, outputs: Mapping[str, Tensor], length: int) -> None:
        """Appends the first `length` rows of k_rows.* and v_rows.*, [B*K, L, W] each; the other rows are padding."""
        start = self.plan(length)
        end = start + length
        for group, names in self._groups:
            slots = group.shape[2]
            buffers = group.numpy()  # slicing numpy arrays takes a tenth of the time
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
        """Returns a view of the filled part of each buffer, [B*K, count, W]."""

        def count(slots: int) -> int:
            wrapped = slots < self.capacity and self._first > 0
            return slots if wrapped else min(self.position, slots)

        return [buffer.numpy()[:, : count(buffer.shape[1])] for buffer in self.buffers.values()]

    @property
    def state(self) -> tuple[int, int]:
        """The position and the earliest position that a ring still holds; with the buffers, the whole state."""
        return self.position, self._first

    def restore(self, state: tuple[int, int]) -> list[np.ndarray]:
        """Sets the state of another cache, and returns the views that the caller must fill; see `filled`."""
        self.position, self._first = state
        return self.filled()

    def copy_from(self, other: "KVCache") -> None:
        """Takes the text of another cache of the same form. Only its filled part is copied; the rest of the memory is
        not touched before it is used.
        """
        for mine, theirs in zip(self.restore(other.state), other.filled(), strict=True):
            mine[...] = theirs

    def room(self, keep: int) -> int:
        """Returns the maximum number of positions after the first `keep` that `slide` can remove.

        It is less than 1 if the window would then reach back to the first positions, which a ring no longer holds.
        """
        seen = self._ring - 1 if self._ring < self.capacity else 0
        return self.position - keep - seen

    def slide(self, keep: int, count: int, moved: Callable[[TensorSpec, np.ndarray], np.ndarray]) -> None:
        """Removes `count` positions after the first `keep`, and moves the later rows forward into their place.

        Args:
            count: at most `room(keep)`.
            moved: given a buffer's spec and rows [B*K, n, W], returns the rows for `count` positions earlier.
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
        """Removes everything from `position` on.

        Raises:
            InputError: position is outside [0, self.position], or a ring no longer holds the window before it.
        """
        if not 0 <= position <= self.position:
            raise InputError(f"cannot rewind to position {position}: the cache holds positions 0 to {self.position}")
        if position == 0:
            self._first = 0
        elif self._first > max(position - self._ring + 1, 0):
            raise InputError(
                f"cannot rewind to position {position}: the model sees {self._ring} positions at a time, and their "
                f"cache has been overwritten; rewind to {self._first + self._ring - 1} or later, or to 0"
            )
        self.position = position

    def shorten(self, position: int) -> None:
        """Removes everything from `position` on, or all if a ring no longer holds the window before it."""
        try:
            self.rewind(position)
        except InputError:
            self.rewind(0)
