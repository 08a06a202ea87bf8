"""Conversion of the tokenizer in a GGUF file to the bytes of a file that `preproc.tokenizer` can open.

GGUF stores lists of tokens with scores and types, or with merges. The former are converted to a SentencePiece model,
the latter to a tokenizer.json. GGUF only names the rules by which text is split.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from model.errors import InputError, listed
from preproc.tokenizer import LLAMA3_PATTERN

TOKENIZER = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
"""GGUF's token types, whose numbers are those of SentencePiece's."""

_TRAINER_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split_by(*patterns: str) -> dict[str, Any]:
    """Returns a pre-tokenizer that splits text by one pattern after another, and represents bytes as printable
    characters.
    """
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, _BYTE_LEVEL | {"use_regex": False}]}


_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Splits words where upper case follows lower case; with endings of words, and the number of digits."""
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_ONE_DIGIT = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_NFC = {"normalizer": {"type": "NFC"}}

_GPT2: dict[str, Any] = {"pre_tokenizer": _BYTE_LEVEL | {"use_regex": True}}
_DIGITS: dict[str, Any] = {
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"use_regex": True}],
    }
}
_LLAMA3: dict[str, Any] = {"pre_tokenizer": _split_by(LLAMA3_PATTERN), "ignore_merges": True}
_GPT4: dict[str, Any] = {"pre_tokenizer": _split_by(LLAMA3_PATTERN)}
_QWEN2: dict[str, Any] = {"pre_tokenizer": _split_by(_ONE_DIGIT), **_NFC}
_GPT4O: dict[str, Any] = {"pre_tokenizer": _split_by(_CASED % (_ENDINGS, _ENDINGS, "{1,3}"))}
SPLITTINGS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "exaone4": _GPT2,
    "jais": _GPT2,
    "olmo": _GPT2 | _NFC,
    "mpt": _GPT2 | _NFC,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
    "command-r": _DIGITS | _NFC,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "dbrx": _GPT4,
    "smaug-bpe": _GPT4,
    "chatglm-bpe": _GPT4,
    "glm4": _GPT4 | {"ignore_merges": True},
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": {"pre_tokenizer": _split_by(_ONE_DIGIT)},
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "tekken": {"pre_tokenizer": _split_by(_CASED % ("", "", "")), "ignore_merges": True},
    "seed-coder": {"pre_tokenizer": _split_by(_ONE_DIGIT.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"))},
    "falcon": {"pre_tokenizer": _split_by(r"[\p{P}$+<=>^~|`]+", _GPT2_PATTERN, "[0-9][0-9][0-9]")},
    "deepseek-coder": {
        "pre_tokenizer": _split_by(
            r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"
        )
    },
    "bloom": {"pre_tokenizer": _split_by(r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+")},
}
"""Maps GGUF's names of splitting rules to the equivalent settings of a tokenizer.json: those of GPT-2, GPT-4, GPT-4o,
Llama 3 and others (ggml-org/llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of each). Where a tokenizer.json
composes characters, so does this, and llama.cpp does not.
"""

STARTS_TEXTS = tuple(name for name, how in SPLITTINGS.items() if how is _LLAMA3)
"""The splitting rules with which a text starts with BOS if the file does not say."""


def tokenizer_bytes(fields: Mapping[str, Any]) -> bytes:
    """Returns the tokenizer described by a file's fields, as the bytes of a tokenizer file.

    Args:
        fields: the fields of the file, by their full names.

    Raises:
        InputError: the file has no tokenizer, or one that cannot be converted exactly.
    """
    if isinstance(whole := fields.get("tokenizer.huggingface.json"), str):
        return whole.encode()
    kind = fields.get(f"{TOKENIZER}model")
    tokens = fields.get(f"{TOKENIZER}tokens") or []
    types = fields.get(f"{TOKENIZER}token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise InputError(f"its tokenizer of {len(tokens)} tokens is damaged; give --tokenizer FILE")
    if kind == "llama":
        return _sentencepiece(fields, tokens, types)
    if kind == "gpt2":
        return _tokenizer_json(fields, tokens, types)
    raise InputError(f"its tokenizer kind {kind!r} is unsupported (supported: 'llama', 'gpt2'); give --tokenizer FILE")


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> bytes:
    """Returns a SentencePiece BPE model. Without other settings in the fields, text is not normalised, as in Llama 1
    and 2.
    """
    scores = fields.get(f"{TOKENIZER}scores") or []
    if len(scores) != len(tokens):
        raise InputError(f"its tokenizer has {len(tokens)} tokens but {len(scores)} scores; give --tokenizer FILE")
    model = sentencepiece_model.ModelProto()
    unknown = fields.get(f"{TOKENIZER}unknown_token_id", types.index(_UNKNOWN) if _UNKNOWN in types else 0)
    for number, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        spare = _UNUSED if kind == _UNKNOWN else kind  # llama.cpp's converter gives that type to padding as well
        model.pieces.add(piece=token, score=score, type=_UNKNOWN if number == unknown else spare)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(tokens)
    trainer.byte_fallback = any(kind == sentencepiece_model.ModelProto.SentencePiece.BYTE for kind in types)
    ids = {name: fields.get(f"{TOKENIZER}{key}_token_id", -1) for name, key in _TRAINER_IDS.items()}
    for name, token in (ids | {"unk": unknown}).items():
        setattr(trainer, f"{name}_id", token)
        if 0 <= token < len(tokens):
            setattr(trainer, f"{name}_piece", tokens[token])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = fields.get(f"{TOKENIZER}add_space_prefix", True)
    normalizer.precompiled_charsmap = bytes(fields.get(f"{TOKENIZER}precompiled_charsmap") or ())
    normalizer.remove_extra_whitespaces = fields.get(f"{TOKENIZER}remove_extra_whitespaces", False)
    return model.SerializeToString()


def _tokenizer_json(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> bytes:
    """Returns the tokenizer.json of a byte-level BPE model."""
    splitting = fields.get(f"{TOKENIZER}pre", "gpt-2")  # llama.cpp's default for files without this key
    if splitting not in SPLITTINGS:
        raise InputError(
            f"its tokenizer splits text as {splitting!r}, which is unsupported (supported: "
            f"{listed(SPLITTINGS, len(SPLITTINGS))}); give --tokenizer FILE"
        )
    how = SPLITTINGS[splitting]
    model = {
        "type": "BPE",
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": fields.get(f"{TOKENIZER}merges") or [],
        "ignore_merges": how.get("ignore_merges", False),
    }
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, "special": kind == _CONTROL, **plain}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": how.get("normalizer"),
        "pre_tokenizer": how["pre_tokenizer"],
        "post_processor": None,
        "decoder": _BYTE_LEVEL | {"use_regex": True},
        "model": model,
    }
    return json.dumps(whole, ensure_ascii=False).encode()
