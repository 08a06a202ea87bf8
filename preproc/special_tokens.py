"""Special tokens in a text that comes in parts, some of which may hold them."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A part of a text, in which the text of a special token is that token, or is only text."""

    text: str
    parse_special: bool


class Special(NamedTuple):
    """A special token, and whether it takes the white space before and behind it along."""

    id: int
    strips_left: bool = False
    strips_right: bool = False


_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""What tokenizers strips: Unicode's White_Space, which is less than what Python does."""


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of some texts, the longest that stands at a place; for nothing where there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class SpecialText:
    """Finds special tokens in a text, leftmost first and the longest of those."""

    def __init__(self, specials: Mapping[str, Special]) -> None:
        self._specials = specials
        self._pattern = any_of(specials)

    def cut(self, parts: Sequence[Part]) -> Iterable[int | tuple[str, bool]]:
        """The ids of the special tokens in the parts that may hold some, and in between what is left of the text: no
        empty section, each with whether it starts the text.
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
        """The ids of all parts; `encode` gives those of a section."""
        cut = self.cut(parts)
        return [token for item in cut for token in ((item,) if isinstance(item, int) else encode(*item))]
