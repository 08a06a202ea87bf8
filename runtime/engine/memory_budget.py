"""Chooses the shards of a model that stay in memory if not all fit."""

from collections.abc import Sequence

from model.errors import InputError

MARGIN = 1.04
"""Ratio of a loaded shard's memory to its matrices' bytes; the rest is norms, scales and the runtime's structures."""


def choose_resident(sizes: Sequence[int], room: int) -> frozenset[int]:
    """Returns the shards that stay loaded. Each of the others is loaded alone for each step, when it runs.

    The first shard is chosen first, because much of its file is an embedding, of which a step reads only a row; then
    the largest, so that the shards loaded for each step need less room.

    Args:
        sizes: memory of each shard in bytes, in order.
        room: bytes that all may take together.

    Raises:
        InputError: there is no room for the largest shard.
    """
    order = sorted(range(len(sizes)), key=lambda number: (number > 0, -sizes[number]))
    found, taken = set[int](), 0
    for number in order:
        others = [sizes[other] for other in order if other != number and other not in found]
        if taken + sizes[number] + max(others, default=0) <= room:
            found.add(number)
            taken += sizes[number]
    if taken + max((sizes[number] for number in order if number not in found), default=0) > room:
        largest = max(range(len(sizes)), key=lambda number: sizes[number])
        raise InputError(
            f"--memory-budget leaves {max(room, 0) / 1e6:.0f} MB for weights, but shard {largest + 1} of {len(sizes)} "
            f"needs {sizes[largest] / 1e6:.0f} MB; give {(sizes[largest] - room) / 1e6:.0f} MB more, or export "
            "with more --shards"
        )
    return frozenset(found)
