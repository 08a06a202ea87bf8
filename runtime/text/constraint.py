"""Constrained generation: the tokens that may follow in a text that must be JSON or match a regular expression.

llguidance (https://github.com/guidance-ai/llguidance) parses the text by its grammar, byte by byte. This module gives
it the bytes of each token of the file's own tokenizer.
"""

import codecs
import functools
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import InputError
from preproc.tokenizer import Tokenizer

JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The JSON layout of json.dumps. If any white space were allowed, a model could generate it without end."""


def json_schema(path: Path) -> str:
    """Returns the grammar of the JSON that the schema in a file (https://json-schema.org) describes.

    Raises:
        InputError: there is no such file, it holds no schema, or llguidance is not installed.
    """
    _require_library()
    if not path.is_file():
        raise InputError(f"{path} is not a file; give one with a JSON schema")
    try:
        return json_grammar(json.loads(path.read_bytes()))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not a valid JSON schema ({_first_line(str(error))}); correct it") from error


def json_grammar(schema: Any) -> str:
    """Returns the grammar of the JSON that a schema describes.

    Raises:
        TypeError, ValueError: `schema` is no schema.
    """
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, defaults=JSON_FORM)  # type: ignore[arg-type]


def json_rule(schema: Mapping[str, Any]) -> str:
    """Returns the right side of a rule for `rules` that matches the JSON that a schema describes."""
    return f"%json {json.dumps({'x-guidance': JSON_FORM} | dict(schema))}"


def rules(text: str) -> str:
    """Returns the grammar of rules in llguidance's Lark syntax, of which the first is called start
    (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
    """
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(text)


def regex(pattern: str) -> str:
    """Returns the grammar of a text that as a whole matches a regular expression in the syntax of Rust's regex crate.

    Raises:
        InputError: llguidance is not installed.
    """
    _require_library()
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


class Constraint:
    """The tokens that may come next in one text; it is updated with each token of the text.

    Where the grammar may end, the stop tokens are allowed; where it must end, only they are.
    """

    def __init__(
        self, grammar: str, tokenizer: Tokenizer | None, stop_ids: Sequence[int], vocab_size: int, prompt: Sequence[int]
    ) -> None:
        """Starts after `prompt`, to which the grammar does not apply.

        Args:
            grammar: the result of `json_schema`, `json_grammar`, `rules` or `regex`.
            stop_ids: the tokens that end a text.
            vocab_size: width of the logits, which may be larger than the tokenizer's vocabulary.

        Raises:
            InputError: the grammar cannot be used, there is no tokenizer or stop token, or the prompt ends inside a
                character.
        """
        from llguidance import LLMatcher

        if tokenizer is None or not stop_ids:
            lacking = "stop token" if tokenizer else "tokenizer"
            raise InputError(f"the file has no {lacking}, which constrained text needs; export one that has")
        self._vocab_size = vocab_size
        self._lost = _start(tokenizer, prompt, vocab_size)
        made = _library_tokenizer(tokenizer, tuple(stop_ids), vocab_size)  # type: ignore[arg-type]  # by identity
        self._matcher = LLMatcher(made, grammar, log_level=0)
        self._check("the grammar cannot be used")

    def allowed(self) -> NDArray[np.bool_]:
        """Returns whether each token may come next, [V].

        Raises:
            InputError: no token of the vocabulary continues the text by the grammar, or the grammar is too complex for
                llguidance.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check("no token continues the text by the grammar")
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool)
        if self._lost:
            allowed[list(self._lost)] = False
            if not allowed.any():  # llguidance allows only tokens that the tokenizer would use; others may fit, too
                others = (i for i in range(self._vocab_size) if i not in self._lost)
                allowed[[i for i in others if self._matcher.validate_tokens([i])]] = True
            if not allowed.any():
                raise InputError("no token that can begin a text follows the grammar; simplify or correct it")
        return allowed

    def take(self, token: int) -> None:
        """Advances the grammar by a token, which must be an allowed one."""
        self._matcher.consume_token(token)
        self._lost = set()

    def _check(self, failure: str) -> None:
        if self._matcher.is_error():
            raise InputError(f"{failure} ({_first_line(self._matcher.get_error())}); simplify or correct it")


@functools.lru_cache(maxsize=2)
def _library_tokenizer(tokenizer: Tokenizer, stop_ids: tuple[int, ...], vocab_size: int) -> Any:
    """Returns llguidance's tokenizer for a vocabulary, made once for all texts of a program."""
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    vocabulary = TokenizerWrapper(_Vocabulary(tokenizer, stop_ids, vocab_size))
    return LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=list(stop_ids))


class _Vocabulary:
    """A tokenizer with llguidance's interface. Control tokens have no text; stop tokens have a placeholder name."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id = None
        self.eos_token_id = stop_ids[0]
        self.special_token_ids = list(stop_ids)
        self.tokens = [tokenizer.piece(token, first=False) for token in range(vocab_size)]
        self._ids = {piece: token for token, piece in enumerate(self.tokens)}
        self._longest = max(map(len, self.tokens))
        for token in stop_ids:
            self.tokens[token] = f"<stop {token}>".encode()

    def __call__(self, text: str) -> list[int]:
        """Returns ids that spell `text` after other text; llguidance uses them where the grammar leaves no choice.

        They are the ids of the tokenizer, so that the model gets the tokens that it was trained on, without what the
        tokenizer adds at the start of a text. If the tokenizer changes the text, the longest matching pieces are used.
        """
        for before in ("", "\x02"):
            ids = self._tokenizer.encode(before + text)
            for start in range(len(ids)):
                if b"".join(self.tokens[token] for token in ids[start:]) == text.encode():
                    return ids[start:]
        return self._spelled(text.encode())

    def _spelled(self, text: bytes) -> list[int]:
        ids, start = list[int](), 0
        while start < len(text):
            ends = range(min(start + self._longest, len(text)), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                return ids
            ids.append(self._ids[text[start:end]])
            start = end
        return ids


def _start(tokenizer: Tokenizer, prompt: Sequence[int], vocab_size: int) -> set[int]:
    """Returns the tokens that cannot begin the text, because they lose their leading space at the start of a text.

    Raises:
        InputError: the prompt ends inside a UTF-8 character.
    """
    before = b"".join(tokenizer.piece(token, first=False) for token in prompt)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    utf8.decode(before)
    if utf8.getstate()[0]:
        raise InputError("the prompt ends inside a character, after which no constrained text can begin; complete it")
    if before:
        return set()
    return {i for i in range(vocab_size) if tokenizer.piece(i, first=True) != tokenizer.piece(i, first=False)}


def _require_library() -> None:
    if find_spec("llguidance") is None:
        raise InputError(
            "--json-schema and --regex need llguidance, which is not installed; run: pip install 'llama-pte[constrain]'"
        )


def _first_line(message: str) -> str:
    """Returns the line of an error message that begins with "error: ", without that, or else the first line."""
    lines = message.splitlines()
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
