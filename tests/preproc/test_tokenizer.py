"""Tests the tokenizers against sentencepiece, tiktoken and tokenizers."""

import json
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from export.checkpoints.layouts import BUILT_IN
from model.errors import InputError
from preproc.tokenizer import (
    LLAMA3_SPECIALS,
    SENTENCEPIECE,
    HuggingFaceTokenizer,
    StreamDecoder,
    Tokenizer,
    decode,
    from_bytes,
    open_tokenizer,
)

TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="aé😀 \n\t019<s>|_▁'"),
    st.sampled_from(["<s>", "<|eot_id|>", " " * 300, "1234567" * 20, "\u200d👩‍👩‍👧", "a" * 2000, "\x00\x01", "ﬁ", "é"]),
)
CORPUS = ["Once upon a time there was a little girl named Lily. " * 20, "été naïve 東京 😀 12345 don't I'll\n\n  x"] * 5


def test_both_languages_have_the_same_sentencepiece() -> None:
    root = Path(__file__).parents[2]
    ours = re.findall(r'"sentencepiece==([\d.]+)"', (root / "pyproject.toml").read_text())
    cmake = (root / "cpp_runner" / "cmake" / "dependencies.cmake").read_text()
    assert ours == re.findall(r"set\(sentencepiece_version ([\d.]+)\)", cmake)
    assert len(ours) == 1


def byte_level() -> tokenizers.Tokenizer:
    """Returns a small byte-level BPE tokenizer, of GPT-2's kind."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    model.train_from_iterator(CORPUS, trainer)
    return model


def byte_fallback() -> tokenizers.Tokenizer:
    """Returns a small BPE tokenizer with byte fallback, like Llama 2's converted tokenizer.json."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.train_from_iterator(["Once upon a time there was a little girl named Lily. " * 20],
                              trainers.BpeTrainer(vocab_size=330, special_tokens=specials))  # fmt: skip
    content = json.loads(model.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # byte pieces are ordinary tokens
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return tokenizers.Tokenizer.from_str(json.dumps(content))


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
TINY = open_tokenizer(BUILT_IN / "tokenizer.model")
WORD_PIECE = json.dumps(
    json.loads(BYTE_LEVEL.to_str()) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
)


@given(TEXTS)
def test_sentencepiece_ids_and_text_are_its_own(text: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=TINY.data)
    ids = theirs.encode(text)
    assert TINY.encode(text) == ids
    assert decode(TINY, ids) == theirs.decode(ids)


@given(st.lists(st.integers(0, TINY.vocab_size - 1), max_size=30))
def test_any_ids_decode_as_sentencepiece_decodes_them(ids: list[int]) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=TINY.data)
    assert decode(TINY, ids) == theirs.decode(ids)


@given(TEXTS)
@pytest.mark.parametrize("model", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
def test_tokenizer_json_ids_and_text_are_its_own(model: tokenizers.Tokenizer, text: str) -> None:
    ours = HuggingFaceTokenizer(model.to_str().encode())
    model.encode_special_tokens = True
    ids = model.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    assert decode(ours, ids) == model.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["llama2_tokenizer.model", "llama3_tokenizer.model"])
def test_real_tokenizers_round_trip(shared: Path, name: str) -> None:
    tokenizer = open_tokenizer(shared / "tokenizers" / name)

    @given(TEXTS)
    def round_trip(text: str) -> None:
        ids = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert decode(tokenizer, ids) == (text.replace("▁", " ") if tokenizer.kind == SENTENCEPIECE else text)

    round_trip()


def test_llama3_has_its_256_special_tokens_behind_the_ranks(shared: Path) -> None:
    tokenizer = open_tokenizer(shared / "tokenizers" / "llama3_tokenizer.model")
    assert tokenizer.vocab_size == 128256
    assert tokenizer.bos_id == 128000
    assert tokenizer.stop_ids == (128001, 128008, 128009)
    assert len(set(LLAMA3_SPECIALS)) == 256
    assert LLAMA3_SPECIALS[-1] == "<|reserved_special_token_246|>"
    assert tokenizer.encode("Hello world!") == [9906, 1917, 0]
    assert tokenizer.encode("<|eot_id|>") != [128009], "the text of a special token is only text"


SPECIAL_TEXTS = st.lists(st.one_of(TEXTS, st.sampled_from(["<s>", "</s>", "<|eot_id|>", "<|endoftext|>"]))).map("".join)


@given(SPECIAL_TEXTS)
def test_special_text_is_parsed_on_request(text: str) -> None:
    ours = HuggingFaceTokenizer(BYTE_LEVEL.to_str().encode())
    BYTE_LEVEL.encode_special_tokens = False
    assert ours.encode(text, parse_special=True) == BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    ids = TINY.encode(text, parse_special=True)
    assert ids.count(2) == text.count("</s>")
    assert 2 not in TINY.encode(text)


def test_tiktoken_parses_special_text_on_request(shared: Path) -> None:
    tokenizer = open_tokenizer(shared / "tokenizers" / "llama3_tokenizer.model")
    assert tokenizer.encode("Hello<|eot_id|>", parse_special=True) == [9906, 128009]


def test_sentencepiece_encodes_text_between_special_tokens_separately() -> None:
    between = [*TINY.encode("Lily had"), 2, 1, *TINY.encode("a dog")]
    assert TINY.encode("Lily had</s><s>a dog", parse_special=True) == between


@given(TEXTS)
def test_streamed_pieces_never_end_inside_a_character(text: str) -> None:
    decoder = StreamDecoder(TINY)
    pieces = [decoder.add(token) for token in TINY.encode(text)]
    assert "\ufffd" not in "".join(pieces).replace("\ufffd" * text.count("\ufffd"), "")
    assert "".join(pieces) + decoder.finish() == decode(TINY, TINY.encode(text))


def test_a_character_that_is_never_completed_is_replaced_at_the_end() -> None:
    decoder = StreamDecoder(TINY)
    first_byte_of_emoji = next(t for t in range(TINY.vocab_size) if TINY.piece(t, first=False) == b"\xf0")
    assert decoder.add(first_byte_of_emoji) == ""
    assert decoder.finish() == "\ufffd"


def test_control_tokens_have_no_text_and_keep_the_first_space_away() -> None:
    ids = TINY.encode("Once")
    assert TINY.bos_id is not None
    assert decode(TINY, [TINY.bos_id, *ids]) == decode(TINY, ids) == "Once"


def test_ids_of_no_piece_have_no_text(shared: Path) -> None:
    """The vocabulary of a model may be padded beyond its tokenizer's."""
    llama3 = open_tokenizer(shared / "tokenizers" / "llama3_tokenizer.model")
    for tokenizer in (TINY, llama3, HuggingFaceTokenizer(BYTE_LEVEL.to_str().encode())):
        assert tokenizer.piece(tokenizer.vocab_size, first=False) == b""
        assert decode(tokenizer, [tokenizer.vocab_size + 7]) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither SentencePiece"),
        (b"plain text, nothing else", "neither SentencePiece"),
        (b'{"model": 1}', "damaged tokenizer.json"),
        (WORD_PIECE.encode(), "decoder WordPiece is unsupported"),
        (b"\n\xff\xff\xff broken protobuf", "damaged sentencepiece"),
        (b"aGVsbG8= 0\nnot-base64!! x\n", "line 2 .* is not `base64 rank`"),
        (b"aGVsbG8= 0\nd29ybGQ= 7\n", "gaps or repeats"),
    ],
)
def test_an_invalid_tokenizer_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_tokenizer(tmp_path / "tokenizer")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent is not a file"):
        open_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("tokenizer", [TINY, HuggingFaceTokenizer(BYTE_LEVEL.to_str().encode())])
def test_the_bytes_give_an_equal_tokenizer(tokenizer: Tokenizer) -> None:
    again = from_bytes(tokenizer.data)
    assert again.kind == tokenizer.kind
    assert again.encode("Lily had a dog.") == tokenizer.encode("Lily had a dog.")
