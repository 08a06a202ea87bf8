"""Tests the tokenizer inside a GGUF file against the one that it was written from."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

from export.checkpoints.gguf_tokenizer import SPLITTINGS, TOKENIZER, tokenizer_bytes
from export.checkpoints.layouts import BUILT_IN, Checkpoint, open_checkpoint
from export.llama import ExportOptions, export_llama
from export.planning.cpp_tokenizer import unsupported_in_cpp
from model.errors import InputError
from preproc.tokenizer import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIALS,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    from_bytes,
    open_tokenizer,
)
from runtime.engine.program import Program
from tests.conftest import TOY, random_model
from tests.golden.gguf import GOLDEN
from tests.support.checkpoints import write_gguf
from tests.support.gguf_files import Add, adds_byte_level

TEXTS = (
    "",
    " ",
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces, a tab\tand\n\n\nlines \r\n",
    "It's 1234567.89 o'clock; I'LL SAY we'Re late!",
    "def add(a: int, b: int) -> int:\n    return a + b  # \u2713\n",
    "\u00c9t\u00e9 na\u00efve e\u0301, Stra\u00dfe, \u0437\u0438\u043c\u0430 \u2014 \u51ac\u5929",
    "\U0001f600\U0001f468\u200d\U0001f469",
    "<s> and </s> and <|begin_of_text|> and <|endoftext|> are text",
    "\u00b2\u00bd \u0663\u0664\u0665 \ufb01 \u00a0\u3000end ",
)


def opened(folder: Path, vocab_size: int, add: Add) -> Checkpoint:
    model = random_model(replace(TOY, n_layers=1, dim=8, n_heads=1, n_kv_heads=1, hidden_dim=8, vocab_size=vocab_size))
    return open_checkpoint(write_gguf(model, folder / "model.gguf", "F32", add_tokenizer=add))


def carried(checkpoint: Checkpoint) -> Tokenizer:
    assert callable(checkpoint.tokenizer)
    return from_bytes(checkpoint.tokenizer())


def adds_sentencepiece(file: Path) -> Add:
    """Returns a function that adds a SentencePiece tokenizer to a GGUF file, as llama.cpp's converter does."""

    def kind(model: SentencePieceProcessor, token: int) -> int:
        kinds = {"unknown": 2, "control": 3, "unused": 5, "byte": 6}
        return next((number for name, number in kinds.items() if getattr(model, f"is_{name}")(token)), 1)

    def add(writer: gguf.GGUFWriter) -> None:
        model = SentencePieceProcessor(model_file=str(file))
        ids = range(model.vocab_size())
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(token) for token in ids])
        writer.add_token_scores([model.get_score(token) for token in ids])
        writer.add_token_types([kind(model, token) for token in ids])
        writer.add_unk_token_id(model.unk_id())
        proto = ModelProto()
        proto.ParseFromString(file.read_bytes())
        writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)

    return add


def same(found: Tokenizer, expected: Tokenizer, texts: tuple[str, ...] = TEXTS) -> None:
    assert found.vocab_size == expected.vocab_size
    for text in texts:
        for parse_special in (False, True):
            ids = expected.encode(text, parse_special)
            assert found.encode(text, parse_special) == ids, text
        for place, token in enumerate(ids):
            assert found.piece(token, place == 0) == expected.piece(token, place == 0)


def long_text(shared: Path) -> str:
    return (shared / "tinystories" / "valid.txt").read_text(encoding="utf-8")[:100_000]


@pytest.mark.parametrize("name", ["tokenizers/llama2_tokenizer.model", "stories260K/tok512.model"])
def test_a_sentencepiece_tokenizer_survives_a_round_trip(name: str, shared: Path, tmp_path: Path) -> None:
    expected = SentencePieceTokenizer((shared / name).read_bytes())
    checkpoint = opened(tmp_path, expected.vocab_size, adds_sentencepiece(shared / name))
    found = carried(checkpoint)
    assert (found.kind, found.bos_id, found.stop_ids) == (expected.kind, 1, (2,))
    assert checkpoint.bos_id == 1
    same(found, expected, (*TEXTS, long_text(shared)))


def test_the_built_in_tokenizer_survives_a_round_trip_and_is_exported(tmp_path: Path) -> None:
    expected = SentencePieceTokenizer((BUILT_IN / "tokenizer.model").read_bytes())
    checkpoint = opened(tmp_path, expected.vocab_size, adds_sentencepiece(BUILT_IN / "tokenizer.model"))
    same(carried(checkpoint), expected)
    pte = export_llama(
        ExportOptions(
            checkpoint.files[0], output=tmp_path / "a.pte", max_seq_len=8, prefill_chunk=1, backend="portable"
        )
    )
    tokenizer = Program(pte).tokenizer
    assert tokenizer is not None
    same(tokenizer, expected)


def test_llama_3s_tokenizer_survives_a_round_trip(shared: Path, tmp_path: Path) -> None:
    file = shared / "tokenizers" / "llama3_tokenizer.model"
    expected = open_tokenizer(file)
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(file))
    tokens = [*sorted(vocab, key=lambda token: vocab[token]), *LLAMA3_SPECIALS]
    add = adds_byte_level(tokens, merges, set(LLAMA3_SPECIALS), "llama-bpe")
    checkpoint = opened(tmp_path, len(tokens), add)
    assert checkpoint.bos_id == 1, "Llama 3's texts start with it"
    same(carried(checkpoint), expected, (*TEXTS, long_text(shared)))


def trained(pre: str) -> tokenizers.Tokenizer:
    """Trains a small tokenizer whose pre-tokenizer is that of a model family, made from the tokenizers library's
    classes.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    qwen = LLAMA3_PATTERN.replace("{1,3}", "")
    tokenizer.pre_tokenizer = {
        "gpt-2": level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
        "llama-bpe": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated"), level]
        ),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(qwen), "isolated"), level]),
    }[pre]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *(file.read_text() for file in Path(__file__).parent.glob("*.py"))], trainer)
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_survives_a_round_trip(pre: str, tmp_path: Path) -> None:
    original = trained(pre)
    expected = HuggingFaceTokenizer(original.to_str().encode())
    vocab = original.get_vocab()
    merges = [tuple(pair) for pair in expected_merges(original)]
    tokens = sorted(vocab, key=lambda token: vocab[token])
    checkpoint = opened(tmp_path, len(tokens), adds_byte_level(tokens, merges, {"<|endoftext|>"}, pre))
    assert checkpoint.bos_id == (1 if pre == "llama-bpe" else None)
    same(carried(checkpoint), expected)


def expected_merges(tokenizer: tokenizers.Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def test_an_embedded_tokenizer_json_is_used_unchanged(tmp_path: Path) -> None:
    whole = trained("gpt-2").to_str()

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_string("tokenizer.huggingface.json", whole)

    assert carried(opened(tmp_path, 700, add)).data == whole.encode()


@pytest.mark.parametrize(
    ("model", "pre", "tokens", "message"),
    [
        (
            "gpt2",
            "default",
            ["a", "b"],
            "splits text as 'default', which is unsupported .supported: bloom, chatglm",
        ),
        ("gpt2", "gpt-2", ["a", "a"], "its tokenizer of 2 tokens is damaged"),
        ("llama", "default", ["a", "b"], "has 2 tokens but 0 scores"),
        ("bert", "default", ["a", "b"], "its tokenizer kind 'bert' is unsupported"),
    ],
)
def test_an_invalid_tokenizer_is_refused_on_use(
    model: str, pre: str, tokens: list[str], message: str, tmp_path: Path
) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)

    checkpoint = opened(tmp_path, 8, add)
    with pytest.raises(InputError, match=f"model.gguf: .*{message}.*; give --tokenizer FILE") as caught:
        carried(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_every_rule_splits_text_as_in_llama_cpp(pre: str) -> None:
    golden = json.loads(GOLDEN.read_text())["splitting"]
    named = {"model": "gpt2", "pre": pre, "tokens": golden["tokens"], "merges": golden["merges"]}
    data = tokenizer_bytes({f"{TOKENIZER}{name}": value for name, value in named.items()})
    tokenizer = from_bytes(data)
    assert [tokenizer.encode(text, False) for text in golden["texts"]] == golden["ids"][pre]
    assert unsupported_in_cpp(data) is None


def test_padding_of_the_unknown_type_is_unused(tmp_path: Path) -> None:
    """llama.cpp's converter writes Phi-3's vocabulary so: <unk> is a control token, and padding is unknown."""
    file = BUILT_IN / "tokenizer.model"
    expected = SentencePieceTokenizer(file.read_bytes())

    def add(writer: gguf.GGUFWriter) -> None:
        adds_sentencepiece(file)(writer)
        (fields,) = writer.kv_data
        for key, more in {"tokens": "[PAD0]", "scores": -1000.0, "token_type": 2}.items():
            fields[f"{TOKENIZER}{key}"].value.append(more)
        fields[f"{TOKENIZER}token_type"].value[SentencePieceProcessor(model_file=str(file)).unk_id()] = 3

    found = carried(opened(tmp_path, expected.vocab_size + 1, add))
    for text in (*TEXTS, "[PAD0]"):
        assert found.encode(text, False) == expected.encode(text, False)
