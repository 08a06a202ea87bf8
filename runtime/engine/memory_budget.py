"""Which shards of a model stay in memory, where not all of them may."""

from collections.abc import Sequence

from model.errors import InputError

MARGIN = 1.04
"""What a loaded shard takes, to the bytes of its matrices: norms, scales and the runtime's own structures."""


def choose_resident(sizes: Sequence[int], room: int) -> frozenset[int]:
    """The shards that stay once they are loaded. Each of the others is loaded when its turn comes, every time anew, and
    alone.

    The first stays before others, as much of its file is an embedding, of which a step reads a row; then the largest,
    so that those that come and go need less room.

    Args:
        sizes: bytes that each takes, in order.
        room: bytes that all may take together.

    Raises:
        InputError: there is no room for the largest.
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
            f"--memory-budget leaves {max(room, 0) / 1e6:.0f} MB for weights, and shard {largest + 1} of {len(sizes)} "
            f"alone takes {sizes[largest] / 1e6:.0f} MB; give {(sizes[largest] - room) / 1e6:.0f} MB more, or export "
            "with more --shards"
        )
    return frozenset(found)
