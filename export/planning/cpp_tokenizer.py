"""Checks a tokenizer.json for features that the C++ runner does not support, so that this is known at export time.

The supported features are those of cpp_runner/src/tokenizer/normalizers.cpp, pre_tokenizers.cpp, token_model.cpp and
regex_pattern.cpp. tests/integration/test_cpp_tokenizer_kinds.py checks that both sides agree.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

_NORMALIZERS = frozenset(
    [
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Strip",
        "StripAccents",
        "Nmt",
        "Prepend",
        "Replace",
        "Precompiled",
        "Lowercase",
        "ByteLevel",
    ]
)
_PRE_TOKENIZERS = frozenset(
    [
        "Split",
        "ByteLevel",
        "Metaspace",
        "Punctuation",
        "Digits",
        "Whitespace",
        "WhitespaceSplit",
        "CharDelimiterSplit",
        "FixedLength",
        "BertPreTokenizer",
    ]
)
_PROPERTIES = frozenset(
    [
        "L",
        "Lu",
        "Ll",
        "Lt",
        "Lm",
        "Lo",
        "M",
        "Me",
        "N",
        "Nd",
        "Nl",
        "No",
        "P",
        "Pc",
        "Pd",
        "Ps",
        "Pe",
        "Pi",
        "Pf",
        "Po",
        "S",
        "Sm",
        "Sc",
        "Sk",
        "So",
        "Z",
        "Zs",
        "Zl",
        "Zp",
        "Cc",
        "Han",
        "Hiragana",
        "Katakana",
        "Hangul",
        "Bopomofo",
        "Latin",
        "Greek",
        "Cyrillic",
        "Arabic",
        "Hebrew",
        "Thai",
        "Lao",
        "Khmer",
        "Myanmar",
        "Tibetan",
        "Devanagari",
        "Bengali",
        "Gurmukhi",
        "Gujarati",
        "Tamil",
        "Telugu",
        "Kannada",
        "Malayalam",
        "Sinhala",
        "Armenian",
        "Georgian",
        "Ethiopic",
        "Mongolian",
    ]
)


def unsupported_in_cpp(data: bytes) -> str | None:
    """Returns the first part of a tokenizer.json that llama_runner does not support; None if it supports all, or for a
    tokenizer of another kind.
    """
    if data.lstrip()[:1] != b"{":
        return None
    file = json.loads(data)
    for stage in _stages(file.get("normalizer"), "normalizers"):
        if stage.get("type") not in _NORMALIZERS:
            return f"its normalizer {stage.get('type')}"
        if found := _in_pattern(stage):
            return f"its normalizer Replace's {found}"
    for stage in _stages(file.get("pre_tokenizer"), "pretokenizers"):
        if stage.get("type") not in _PRE_TOKENIZERS:
            return f"its pre_tokenizer {stage.get('type')}"
        if found := _in_pattern(stage):
            return f"its pre_tokenizer Split's {found}"
    dropout = file.get("model", {}).get("dropout")
    return f"its model's dropout {dropout}" if dropout else None


def _stages(stage: dict[str, Any] | None, members: str) -> Iterator[dict[str, Any]]:
    if stage is None:
        return
    if stage.get("type") != "Sequence":
        yield stage
        return
    for inner in stage[members]:
        yield from _stages(inner, members)


def _in_pattern(stage: dict[str, Any]) -> str | None:
    pattern = stage.get("pattern")
    if not isinstance(pattern, dict) or "Regex" not in pattern:
        return None
    at = _Pattern(pattern["Regex"]).first_unknown()
    return None if at is None else f"pattern {pattern['Regex']!r} at {pattern['Regex'][at : at + 12]!r}"


_SET = re.compile(r"\\(?:[sSwWdD]|[pP]\{(?P<property>[^}]*)\})")
_LITERAL = re.compile(
    r"""\\x\{[0-9a-fA-F]{1,6}\} | \\x[0-7][0-9a-fA-F] | \\u[0-9a-fA-F]{4}  # a code
    | \\[nrtfv] | \\(?=[\x00-\x7f])[^0-9a-zA-Z]  # an escape
    | [^\\]""",
    re.DOTALL | re.VERBOSE,
)
_INTERVAL = re.compile(r"\{(?!,?\})(?P<least>[0-9]{0,4})(?P<comma>,[0-9]{0,4})?\}")
_OPENER = re.compile(r"\((?:\?(?::|i:|>|=|!|<=|<!|i\))|(?!\?))")
_ANCHOR = re.compile(r"[|^$]|\\[bBAz]")
_FOLDED_PAIRS = frozenset(("ss", "st", "ff", "fi", "fl"))


class _Pattern:
    """Parser of regular expressions that accepts the same patterns as regex_pattern.cpp."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._groups = [(False, False, True)]  # per open group: caseless, lookbehind, repeatable
        self._may_repeat = False
        self._letter = ""

    def first_unknown(self) -> int | None:
        """Returns the offset of the first part that is not supported; None if all of the pattern is."""
        while self._at < len(self._pattern):
            start = self._at
            if not self._next() or len(self._groups) > 64:
                return start
        return None if len(self._groups) == 1 else 0

    def _take(self, token: re.Pattern[str]) -> re.Match[str] | None:
        if found := token.match(self._pattern, self._at):
            self._at = found.end()
        return found

    def _starts(self, text: str) -> bool:
        return self._pattern.startswith(text, self._at)

    def _passed(self, may_repeat: bool, letter: str = "") -> bool:
        self._may_repeat, self._letter = may_repeat, letter
        return True

    def _next(self) -> bool:
        char = self._pattern[self._at]
        if self._take(_ANCHOR):
            return self._passed(False)
        if char == ")":
            self._at += 1
            may_repeat = self._groups.pop()[2]
            return bool(self._groups) and self._passed(may_repeat)
        if char == "(":
            return self._open()
        if char in "*+?{":
            return self._repeat()
        if char == "[":
            return self._bracket(0) and self._passed(True)
        if char == ".":
            self._at += 1
            return self._passed(True)
        if (known := self._set()) is not None:
            return known and self._passed(True)
        return self._literal()

    def _open(self) -> bool:
        is_caseless, is_lookbehind, _ = self._groups[-1]
        found = None if is_lookbehind else self._take(_OPENER)
        if found is None:
            return False
        if found[0] == "(?i)":
            self._groups[-1] = (True, *self._groups[-1][1:])
        else:
            looks = found[0] in ("(?=", "(?!", "(?<=", "(?<!")
            self._groups.append((is_caseless or found[0] == "(?i:", found[0].startswith("(?<"), not looks))
        return self._passed(False)

    def _repeat(self) -> bool:
        interval = self._pattern[self._at] == "{"
        found = _INTERVAL.match(self._pattern, self._at) if interval else None
        if interval and not found:
            self._at += 1
            return self._passed(True)
        if not self._may_repeat or self._groups[-1][1]:
            return False
        self._at = found.end() if found else self._at + 1
        if self._starts("?") and found and found["comma"] is None:
            return False
        self._at += self._starts("?") or self._starts("+")
        return self._passed(False)

    def _set(self) -> bool | None:
        r"""Returns whether a set such as \p{L} is supported; None if there is no set here. Moves past a
        supported set.
        """
        found = _SET.match(self._pattern, self._at)
        if found is None:
            return None
        name = found["property"]
        if name is not None:
            name = name.removeprefix("^")
            if name not in _PROPERTIES or (self._groups[-1][0] and name in ("Lu", "Ll", "Lt")):
                return False
        self._at = found.end()
        return True

    def _literal(self) -> bool:
        found = self._take(_LITERAL)
        if found is None:
            return False
        is_caseless, text = self._groups[-1][0], found[0]
        if not is_caseless:
            return self._passed(True)
        letter = text.lower() if re.fullmatch("[a-zA-Z]", text) else ""
        if not letter and _is_wide(text):
            return False
        return self._letter + letter not in _FOLDED_PAIRS and self._passed(True, letter)

    def _bracket(self, depth: int) -> bool:
        """Returns whether a character class is supported, and moves past it if so."""
        self._at += 1
        self._at += self._starts("^")
        if depth > 64 or self._starts("]"):
            return False
        is_literal, after_set, is_empty = False, False, True
        while not self._starts("]"):
            if self._at >= len(self._pattern) or self._starts("[:"):
                return False
            if self._starts("&&"):
                self._at += 2
                if is_empty or self._starts("]") or self._starts("&"):
                    return False
                is_literal, after_set, is_empty = False, False, True
                continue
            is_empty = False
            if self._starts("["):
                known, is_literal = self._bracket(depth + 1), False
            elif self._starts("-"):
                known, is_literal = self._range(is_literal, after_set), False
            elif (in_set := self._set()) is not None:
                known, is_literal = in_set, False
            else:
                known = is_literal = self._class_literal()
            after_set = not is_literal
            if not known:
                return False
        self._at += 1
        return True

    def _range(self, is_range: bool, after_set: bool) -> bool:
        self._at += 1
        if self._starts("]"):
            return True
        if after_set:
            return False
        if not is_range:
            return True
        return not (self._starts("[") or self._starts("&&")) and self._class_literal()

    def _class_literal(self) -> bool:
        found = self._take(_LITERAL)
        return found is not None and not (self._groups[-1][0] and _is_wide(found[0]))


def _is_wide(literal: str) -> bool:
    """Returns whether a literal is not a plain ASCII character, so that other characters may be equal to it except for
    case.
    """
    return not literal.isascii() or literal.startswith(("\\x", "\\u", "\\v"))
