"""Tests every stage and model that a tokenizer.json may have, in C++ against the tokenizers library."""

import json
import random
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from export.planning.cpp_tokenizer import unsupported_in_cpp
from preproc.tokenizer import from_bytes
from tests.integration.test_cpp_tokenizers import STRINGS, TOOL, _fuzzed, _run, _texts, _unpack

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="needs the C++ runner; build it first (make runner)")

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@cache
def _vocabulary(is_byte_level: bool) -> dict[str, Any]:
    """Trains a small BPE and returns its model and special token."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel() if is_byte_level else pre_tokenizers.Metaspace()
    fallback = [] if is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_byte_level else []
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=["<unk>", *fallback])
    tokenizer.train_from_iterator(_texts(), trainer)
    return {key: json.loads(tokenizer.to_str())[key] for key in ("model", "added_tokens")}


def _stages(normalizer: Any = None, pre_tokenizer: Any = None, is_byte_level: bool = True, **model: Any) -> bytes:
    """Returns a tokenizer.json with the given stages and a small vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    content = json.loads(tokenizer.to_str())
    learned = _vocabulary(is_byte_level)
    content["model"] = learned["model"] | model
    content["added_tokens"] = learned["added_tokens"][:1]
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    if not is_byte_level:
        content["decoder"] = json.loads(tokenizers.decoders.ByteFallback().__getstate__())
    return json.dumps(content).encode()


def _split(pattern: Any, behavior: str, invert: bool = False) -> Callable[[], bytes]:
    stages = [pre_tokenizers.Split(pattern, behavior, invert), BYTES]
    return lambda: _stages(pre_tokenizer=pre_tokenizers.Sequence(stages))


def _before(stage: Any) -> Callable[[], bytes]:
    """Returns a maker of a tokenizer that applies a stage before it splits text into bytes."""
    return lambda: _stages(pre_tokenizer=pre_tokenizers.Sequence([stage, BYTES]))


def _normalized(*stages: Any) -> Callable[[], bytes]:
    normalizer = normalizers.Sequence(list(stages)) if len(stages) > 1 else stages[0]
    return lambda: _stages(normalizer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def _spaced(scheme: str, split: bool, replacement: str = "▁") -> Callable[[], bytes]:
    stage = pre_tokenizers.Metaspace(replacement=replacement, prepend_scheme=scheme, split=split)
    return lambda: _stages(pre_tokenizer=stage, is_byte_level=False, unk_token="<unk>", byte_fallback=True)


def _unigram(byte_fallback: bool) -> bytes:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=["<unk>", *fallback], unk_token="<unk>")
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.decoder = decoders.Metaspace()
    content = json.loads(tokenizer.to_str())
    content["model"]["byte_fallback"] = byte_fallback
    content["added_tokens"] = content["added_tokens"][:1]
    return json.dumps(content).encode()


def _added(**options: bool) -> bytes:
    tokenizer = tokenizers.Tokenizer.from_str(_stages(normalizers.Lowercase(), pre_tokenizers.ByteLevel()).decode())
    tokens = [AddedToken(text, special=False, **options) for text in ("<tool_call>", "THE", "été", "=-")]
    tokenizer.add_tokens(tokens)
    return str(tokenizer.to_str()).encode()


BEHAVIORS = ("removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous")

KINDS: dict[str, Callable[[], bytes]] = {
    **{f"split at a text, {how}": _split(" ", how) for how in BEHAVIORS},
    **{f"split at a pattern, {how}": _split(Regex(r"\d+|\s"), how) for how in BEHAVIORS},
    "split but at a pattern": _split(Regex(r"\w+|[^\w\s]+"), "isolated", invert=True),
    "split at Han": _split(Regex(r"[\p{Han}\p{Hiragana}\p{Katakana}]+|\p{Cyrillic}+"), "isolated"),
    **{f"punctuation, {how}": _before(pre_tokenizers.Punctuation(how)) for how in BEHAVIORS},
    "digits": _before(pre_tokenizers.Digits(individual_digits=False)),
    "digits one by one": _before(pre_tokenizers.Digits(individual_digits=True)),
    "white space": _before(pre_tokenizers.Whitespace()),
    "white space alone": _before(pre_tokenizers.WhitespaceSplit()),
    "bytes with a space before them": lambda: _stages(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    **{
        f"spaces, {how}, split {split}": _spaced(how, split)
        for how in ("always", "first", "never")
        for split in (False, True)
    },
    "spaces as underscores": _spaced("always", True, "_"),
    **{form: _normalized(getattr(normalizers, form)()) for form in ("NFC", "NFD", "NFKC", "NFKD")},
    "lower case": _normalized(normalizers.Lowercase()),
    "strip": _normalized(normalizers.Strip()),
    "strip left": _normalized(normalizers.Strip(left=True, right=False)),
    "strip accents": _normalized(normalizers.NFD(), normalizers.StripAccents()),
    "replace": _normalized(normalizers.Replace(Regex(r"\s+"), " "), normalizers.Replace("e", "3")),
    "prepend": _normalized(normalizers.Prepend("<")),
    "unigram": lambda: _unigram(byte_fallback=False),
    "unigram with bytes": lambda: _unigram(byte_fallback=True),
    "unknown ones fused": lambda: _stages(is_byte_level=False, unk_token="<unk>", fuse_unk=True),
    "unknown ones apart": lambda: _stages(is_byte_level=False, unk_token="<unk>", fuse_unk=False),
    **{
        f"added, {option}": (lambda option=option: _added(**{option: True}))  # type: ignore[misc]
        for option in ("single_word", "lstrip", "rstrip", "normalized")
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_library(name: str, tmp_path: Path) -> None:
    data = KINDS[name]()
    expected = from_bytes(data)
    rng = random.Random(11)
    texts = [_fuzzed(rng) for _ in range(STRINGS)]
    assert unsupported_in_cpp(data) is None
    for text, answer in zip(texts, _run(TOOL, data, [("e", text) for text in texts], tmp_path / "x"), strict=True):
        assert _unpack(answer) == expected.encode(text.decode(errors="replace")), text


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        (
            "normalizer",
            {"type": "Replace", "pattern": {"Regex": r"\Ka"}, "content": "b"},
            "normalizer Replace's pattern",
        ),
        ("pre_tokenizer", {"type": "UnicodeScripts"}, "pre_tokenizer UnicodeScripts"),
        (
            "pre_tokenizer",
            {"type": "Split", "pattern": {"Regex": r"\X"}, "behavior": "Isolated", "invert": False},
            "pre_tokenizer Split's pattern",
        ),
        ("normalizer", {"type": "BertNormalizer", "clean_text": True}, "normalizer BertNormalizer"),
    ],
)
def test_export_warns_of_what_the_runner_refuses(part: str, value: dict[str, Any], named: str, tmp_path: Path) -> None:
    data = json.dumps(json.loads(_stages()) | {part: value}).encode()
    found = unsupported_in_cpp(data)
    assert found is not None
    assert named in found
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    done = subprocess.run([TOOL, path], input=b"", capture_output=True, check=False)
    assert done.returncode == 2
    assert b"which this runner does not support" in done.stderr
