"""InputError, the one exception that means the user's input is at fault."""

from collections.abc import Iterable


class InputError(ValueError):
    """Raised for input that cannot be used. The message is one sentence with the value received and what to do about
    it.

    Commands print the message and exit with status 2. Any other exception is a bug in this program and keeps its
    traceback.
    """


def listed(names: Iterable[str], most: int = 4) -> str:
    """Joins sorted names for a message and shortens a long list: 'a, b, c, d and 12 more'."""
    names = sorted(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
