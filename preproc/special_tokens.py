"""Recognition of special tokens in a text given in parts, only some of which may contain them."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A part of a text. If `parse_special`, the text of a special token stands for that token; otherwise it is ordinary
    text.
    """

    text: str
    parse_special: bool


class Special(NamedTuple):
    """A special token, and whether it absorbs the white space before and after it."""

    id: int
    strips_left: bool = False
    strips_right: bool = False


_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Characters that the tokenizers library strips: Unicode's White_Space, which has fewer characters than Python's
str.strip.
"""


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches any of the texts, preferring the longest at each place. Without texts, it matches
    nothing.
    """
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class SpecialText:
    """Finds special tokens in a text: the leftmost, and the longest of those at one place."""

    def __init__(self, specials: Mapping[str, Special]) -> None:
        self._specials = specials
        self._pattern = any_of(specials)

    def cut(self, parts: Sequence[Part]) -> Iterable[int | tuple[str, bool]]:
        """Yields the ids of the special tokens, and the sections of ordinary text between them.

        A section is never empty, and comes with a flag that is true if it starts the text. Special tokens are only
        recognised in parts with `parse_special`.
        """
        text = "".join(part.text for part in parts)
        done = 0
        for match in self._matches(parts, text):
            special, (start, end) = self._specials[match[0]], match.span()
            if start < done:
                continue
            if special.strips_left:
                start = max(done, len(text[:start].rstrip(_WHITE_SPACE)))
            if special.strips_right:
                end = len(text) - len(text[end:].lstrip(_WHITE_SPACE))
            if start > done:
                yield text[done:start], done == 0
            yield special.id
            done = end
        if done < len(text):
            yield text[done:], done == 0

    def _matches(self, parts: Sequence[Part], text: str) -> Iterable[re.Match[str]]:
        end = 0
        for parse_special, group in itertools.groupby(parts, key=lambda part: part.parse_special):
            start, end = end, end + sum(len(part.text) for part in group)
            if parse_special:
                yield from self._pattern.finditer(text, start, end)

    def encode(self, parts: Sequence[Part], encode: Callable[[str, bool], Sequence[int]]) -> list[int]:
        """Returns the ids of all parts; `encode` returns the ids of a section of ordinary text."""
        cut = self.cut(parts)
        return [token for item in cut for token in ((item,) if isinstance(item, int) else encode(*item))]
