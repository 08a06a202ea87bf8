"""The one error that is the user's to mend."""

from collections.abc import Iterable


class InputError(ValueError):
    """What was given cannot be used. The message is one sentence: the value received and what to do.

    Commands print it and exit with 2; every other exception is a bug of ours and keeps its traceback.
    """


def listed(names: Iterable[str], most: int = 4) -> str:
    """Joins names for a message, cutting a long list: 'a, b, c, d and 12 more'."""
    names = sorted(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
