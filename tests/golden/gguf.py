"""Writes the ids that llama.cpp gives for the tests' GGUF files. Needs llama-cpp-python, which `make bench` installs.

python -m tests.golden.gguf

Prints, for each splitting rule, how many of 2,000 random texts have the same ids. Steps whose two best logits are close
are marked, because llama.cpp rounds GELU to float16.
"""

import json
import random
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from export.checkpoints.checkpoint import content_digest
from export.checkpoints.gguf_tokenizer import SPLITTINGS
from export.checkpoints.layouts import open_checkpoint
from preproc.tokenizer import Tokenizer, from_bytes
from tests.conftest import TOY, random_model
from tests.support.checkpoints import write_gguf
from tests.support.gguf_files import COMPARED, GGUF_CASES, adds_byte_level, write

GOLDEN = Path(__file__).parent / "gguf.json"
PROMPT = [1, 17, 42, 99, 5, 6, 120, 64, 33, 7, 150, 88, 2, 71, 14, 9, 101, 56, 12, 140]
STEPS, CLOSE = 24, 0.05
LINES = (
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces, a tab\tand\n\n\nlines \r\n   end  ",
    "It's 1234567.89 o'clock; I'LL SAY we'Re late! can't won't y'all'd",
    "def add(a: int, b: int) -> int:\n    return a + b  # \u2713\n\n\tx **= 2;",
    "\u00c9t\u00e9 na\u00efve Stra\u00dfe \u0437\u0438\u043c\u0430 \u2014 \u51ac\u5929 "
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\U0001f600\U0001f468\u200d\U0001f469 \u00b2\u00bd \u0663\u0664\u0665 \ufb01 \u00a0x",
    "HelloWorld XMLHttpRequest iPhone a/b/\n//c $1+<=>^~|`2` 12 345 6789 0",
    "?!...\n--- (a) [b] {c} \u060c\u06d4\u0964 don\u2019t 3rd v2.0 x_y",
)
"""Texts from which a vocabulary is trained that crosses the borders at which any rule splits."""


def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Returns tokens and merges of a byte-level BPE that was trained on text that is not split."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=560, initial_alphabet=alphabet, max_token_length=6, show_progress=False)
    generator = random.Random(0)
    tokenizer.train_from_iterator([*LINES, *(text(generator) for _ in range(400))], trainer)
    vocab = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocab, key=lambda token: vocab[token]), [(left, right) for left, right in merges]


def text(generator: random.Random) -> str:
    """Returns a random text, composed as qwen2's and others' normalisers compose it, which llama.cpp does not."""
    pieces = []
    for _ in range(generator.randint(1, 8)):
        line = generator.choice(LINES)
        start = generator.randrange(len(line))
        pieces.append(line[start : start + generator.randint(1, 6)])
    return unicodedata.normalize("NFC", "".join(pieces))


def written(folder: Path, pre: str, tokens: list[str], merges: list[tuple[str, str]]) -> Path:
    """Writes a small model with a byte-level tokenizer that splits by a rule."""
    config = replace(TOY, n_layers=1, dim=32, n_heads=1, n_kv_heads=1, head_dim=32, hidden_dim=32)
    model = random_model(replace(config, vocab_size=len(tokens)))
    return write_gguf(model, folder / f"{pre}.gguf", "F32", add_tokenizer=adds_byte_level(tokens, merges, set(), pre))


def ours(path: Path) -> Tokenizer:
    tokenizer = open_checkpoint(path).tokenizer
    assert callable(tokenizer)
    return from_bytes(tokenizer())


def greedy(engine: Any) -> dict[str, list[int]]:
    """Returns greedy ids, and the steps whose two best logits are close."""
    ids, close = list[int](), list[int]()
    for step in range(STEPS):
        logits, best = engine.logits(PROMPT + ids, len(PROMPT) + step - 1)[0].topk(2)
        ids.append(int(best[0]))
        if logits[0] - logits[1] < CLOSE:
            close.append(step)
    return {"ids": ids, "close": close}


def main() -> None:
    from tests.bench.engines import LlamaCpp

    class Exact(LlamaCpp):
        cache = 0

    golden: dict[str, Any] = {"greedy": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in COMPARED:
            path = write(GGUF_CASES[case], folder / "model.gguf")
            golden["greedy"][case] = {"file": content_digest([path]), **greedy(Exact(path, 64))}
        tokens, merges = vocabulary()
        generator = random.Random(1)
        texts = [*LINES, *(text(generator) for _ in range(2000))]
        joined = [" ".join(pair) for pair in merges]
        golden["splitting"] = {"texts": LINES, "tokens": tokens, "merges": joined, "ids": {}}
        for pre in SPLITTINGS:
            path = written(folder, pre, tokens, merges)
            engine, tokenizer = Exact(path, 64), ours(path)
            found = [engine.tokens(line.encode()) for line in texts]
            same = sum(ids == tokenizer.encode(line, False) for ids, line in zip(found, texts, strict=True))
            golden["splitting"]["ids"][pre] = found[: len(LINES)]
            print(f"{pre:30} {same} of {len(texts)} texts", flush=True)
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
