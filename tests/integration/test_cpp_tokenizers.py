"""Tests the C++ runner's tokenizers against sentencepiece, tiktoken and tokenizers, on thousands of fuzzed strings."""

import json
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from export.checkpoints.layouts import BUILT_IN
from preproc.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIALS, decode, from_bytes
from tests.conftest import BUILD, ROOT

SHARED = ROOT.parent / "shared" / "data" / "tokenizers"
TOOL = BUILD / "tests" / "tokenizer_tool"
STRINGS = 5000

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tool() -> Path:
    if not TOOL.exists():
        pytest.fail(f"{TOOL} does not exist; build the runner first (make runner)")
    return TOOL


def _texts() -> list[str]:
    """Returns enough text in several scripts to train a small vocabulary."""
    words = [path.read_text() for path in sorted(ROOT.glob("*/*.py"))]
    return [
        *words,
        "naïve café Ünïcödé straße Ångström e\u0301a\u0308 한국어 日本語の文章 中文句子 русский текст 🙂🙃👩‍👩‍👧",
    ] * 2


def _bpe(tokenizer: tokenizers.Tokenizer, alphabet: list[str], specials: list[str]) -> bytes:
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=specials)
    tokenizer.train_from_iterator(_texts(), trainer)
    return str(tokenizer.to_str()).encode()


def _gpt2() -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _bpe(tokenizer, pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>"])


def _qwen() -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    data = json.loads(_bpe(tokenizer, pre_tokenizers.ByteLevel.alphabet(), SPECIALS))
    plain = {**data["added_tokens"][0], "special": False}
    data["added_tokens"].append({**plain, "id": 1500, "content": "<tool_call>"})
    data["added_tokens"].append({**plain, "id": 1501, "content": "<strip>", "lstrip": True, "rstrip": True})
    return json.dumps(data).encode()


def _llama3() -> bytes:
    """Returns a small version of Llama 3's tokenizer.json: its pattern, up to three digits at once, whole words without
    merges.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _bpe(tokenizer, pre_tokenizers.ByteLevel.alphabet(), list(LLAMA3_SPECIALS[:4]))


def _metaspace(*, legacy: bool) -> bytes:
    """Returns a small version of Llama 2's tokenizer.json, with byte fallback. The normalizer (legacy) or the
    pre-tokenizer adds the space mark.
    """
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>", *fallback])
    trained.train_from_iterator(_texts(), trainer)
    learned, data = json.loads(trained.to_str()), json.loads(tokenizer.to_str())
    data["model"] |= {key: learned["model"][key] for key in ("vocab", "merges")}
    data["added_tokens"] = learned["added_tokens"][:3]
    return json.dumps(data).encode()


def _shared(name: str) -> bytes:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/tokenizers/{name}, which a user's clone does not have")
    return path.read_bytes()


TOKENIZERS: dict[str, Callable[[], bytes]] = {
    "tiny": lambda: (BUILT_IN / "tokenizer.model").read_bytes(),
    "llama2": lambda: _shared("llama2_tokenizer.model"),
    "llama3": lambda: _shared("llama3_tokenizer.model"),
    "gpt2.json": _gpt2,
    "qwen.json": _qwen,
    "llama3.json": _llama3,
    "llama2.json": lambda: _metaspace(legacy=True),
    "metaspace.json": lambda: _metaspace(legacy=False),
}


def _fuzzed(rng: random.Random) -> bytes:
    """Returns a random text of a kind that is difficult for tokenizers, or several of them joined."""
    kinds: list[Callable[[], bytes]] = [
        lambda: " ".join(
            rng.choices(["the", "Don't", "WE'LL", "x\u017f's", "été", "naïve", "12345", "3.14"], k=6)
        ).encode(),
        lambda: "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(40))).encode(),
        lambda: "".join(chr(rng.choice(_RANGES)[rng.randrange(2)]) for _ in range(rng.randrange(20))).encode(),
        lambda: "".join(_any_character(rng) for _ in range(rng.randrange(20))).encode(),
        lambda: "".join(
            rng.choices("🙂👩‍👧🏽é\u0301ﬁ\u200d\ufe0f\u00a0\u2028\u0085\u180e\u3000", k=rng.randrange(12))
        ).encode(),
        lambda: bytes(rng.randrange(32) for _ in range(rng.randrange(10))),
        lambda: bytes(rng.randrange(256) for _ in range(rng.randrange(24))),
        lambda: bytes(rng.choices(b"\xf0\x9f\x99\x82\xe2\x80\xed\xa0\xc3\xf4\x90", k=rng.randrange(16))),
        lambda: rng.choice([" ", "\n", "\t", "\r\n", " \n", "\u3000", "a", "é", "1", "=", "٣"]).encode()
        * rng.randrange(300),
        lambda: rng.choice(
            [*SPECIALS, *LLAMA3_SPECIALS[:12], "<s>", "</s>", "<unk>", "<0x0A>", "▁", "<tool_call>", "  <strip> \u3000"]
        ).encode(),
    ]
    return b"".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 4)))


_RANGES = [
    (0x41, 0x5A),
    (0xC0, 0x17F),
    (0x300, 0x36F),
    (0x400, 0x4FF),
    (0x600, 0x6FF),
    (0xAC00, 0xD7A3),
    (0x4E00, 0x9FFF),
]


def _any_character(rng: random.Random) -> str:
    code = rng.choice([rng.randrange(0x3000), rng.randrange(0x10FFFF)])
    return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"


def _run(tool: Path, data: bytes, requests: list[tuple[str, bytes]], path: Path) -> list[bytes]:
    path.write_bytes(data)
    message = b"".join(kind.encode() + struct.pack("<I", len(body)) + body for kind, body in requests)
    done = subprocess.run([tool, path], input=message, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    answers, rest = [], memoryview(done.stdout)
    while rest:
        (length,) = struct.unpack_from("<I", rest)
        answers.append(bytes(rest[4 : 4 + length]))
        rest = rest[4 + length :]
    assert len(answers) == len(requests)
    return answers


def _pack(ids: list[int]) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)


def _unpack(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 4}i", data))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_equals_the_python_libraries(name: str, tool: Path, tmp_path: Path) -> None:
    data = TOKENIZERS[name]()
    expected = from_bytes(data)
    rng = random.Random(7)
    texts = [_fuzzed(rng) for _ in range(STRINGS)]
    ids = [[rng.randrange(expected.vocab_size) for _ in range(rng.randrange(12))] for _ in range(STRINGS)]
    requests = [(kind, text) for kind in "es" for text in texts] + [("d", _pack(some)) for some in ids]
    answers = _run(tool, data, requests, tmp_path / name)
    for text, plain, special in zip(texts, answers[:STRINGS], answers[STRINGS : 2 * STRINGS], strict=True):
        assert _unpack(plain) == expected.encode(text.decode(errors="replace")), text
        assert _unpack(special) == expected.encode(text.decode(errors="replace"), parse_special=True), text
    for some, answer in zip(ids, answers[2 * STRINGS :], strict=True):
        assert answer.decode() == decode(expected, some), some


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_runs_end(name: str, tool: Path, tmp_path: Path) -> None:
    data = TOKENIZERS[name]()
    expected = from_bytes(data)
    texts = [unit * (100_000 // len(unit)) for unit in (" ", "a", "1", "ab ", "\n", "é", "=-")]
    answers = _run(tool, data, [("e", text.encode()) for text in texts], tmp_path / name)
    for text, answer in zip(texts, answers, strict=True):
        assert _unpack(answer) == expected.encode(text), text[:3]


def test_special_text_becomes_special_tokens_on_request(tool: Path, tmp_path: Path) -> None:
    data = _qwen()
    library = tokenizers.Tokenizer.from_str(data.decode())
    text = "<|im_start|>user\nhi<|im_end|> <tool_call> <|endoftext|>"
    (answer,) = _run(tool, data, [("s", text.encode())], tmp_path / "qwen.json")
    assert _unpack(answer) == library.encode(text, add_special_tokens=False).ids
    data = (BUILT_IN / "tokenizer.model").read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    (answer,) = _run(tool, data, [("s", b"<s>Once upon a time</s>")], tmp_path / "tiny.model")
    assert _unpack(answer) == [model.bos_id(), *model.encode("Once upon a time"), model.eos_id()]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"Regex": r"\Ka"}, "content": "b"}),
        ("pre_tokenizer", {"type": "UnicodeScripts"}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": r"\X"}, "behavior": "Isolated", "invert": False}),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
    ],
)
def test_refuses_unsupported_parts(part: str, value: object, tool: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(_gpt2()) | {part: value}))
    done = subprocess.run([tool, path], input=b"", capture_output=True, check=False)
    assert done.returncode == 2
    assert b"which this runner does not support" in done.stderr


def test_decodes_as_the_libraries_do(tool: Path, tmp_path: Path) -> None:
    data = _qwen()
    library = tokenizers.Tokenizer.from_str(data.decode())
    texts = ["Once upon a time, 3 café 🙂", "日本語 \n\n x"]
    requests = [("d", _pack(library.encode(text).ids)) for text in texts]
    assert [answer.decode() for answer in _run(tool, data, requests, tmp_path / "qwen.json")] == texts
