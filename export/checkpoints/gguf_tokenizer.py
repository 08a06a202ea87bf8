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
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types have the same numbers as SentencePiece's

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split_by(pattern: str) -> dict[str, Any]:
    """Returns a pre-tokenizer that splits text by a pattern and represents bytes as printable characters."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL | {"use_regex": False}]}


_GPT2: dict[str, Any] = {"pre_tokenizer": _BYTE_LEVEL | {"use_regex": True}}
_LLAMA3: dict[str, Any] = {"pre_tokenizer": _split_by(LLAMA3_PATTERN), "ignore_merges": True}
_QWEN2: dict[str, Any] = {
    "pre_tokenizer": _split_by(LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")),
    "normalizer": {"type": "NFC"},
}
_SMOLLM: dict[str, Any] = {
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"use_regex": True}],
    }
}
SPLITTINGS = {
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": _SMOLLM,
}
"""Maps GGUF's names of splitting rules to the equivalent settings of a tokenizer.json: those of GPT-2, Llama 3, Qwen 2
and SmolLM (ggml-org/llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of each).
"""

STARTS_TEXTS = ("llama-bpe", "llama3", "llama-v3")
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
    types = fields.get(f"{TOKENIZER}token_type") or [1] * len(tokens)
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
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(tokens)
    trainer.byte_fallback = any(kind == sentencepiece_model.ModelProto.SentencePiece.BYTE for kind in types)
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token = fields.get(f"{TOKENIZER}{key}_token_id", -1)
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
