"""Prepares text for training: splits and repairs stories, trains their tokenizer, and makes rows of tokens."""

import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from model.errors import InputError

BOS, EOS = 1, 2
SEPARATOR = "<|endoftext|>"
OPENING = re.compile(r"Once |One day, an? |There (once )?was |In an? |[A-Z]\w+ and [A-Z]\w+ (were|are|like|live)")
"""The beginning of a story, for text without marks between stories."""
TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\u200a": " "})


def repair(text: str) -> str:
    """Undoes UTF-8 that was read as Windows-1252 and writes quotes and dashes in ASCII."""

    def decode(match: re.Match[str]) -> str:
        encoded = b"".join(_windows_1252(character) for character in match[0])
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError:
            return match[0]

    return re.sub(r"[^\x00-\x7f]+", decode, text).translate(TYPOGRAPHY)


def _windows_1252(character: str) -> bytes:
    """Returns the character's byte in Windows-1252; its five undefined bytes stay, other characters become 0xff."""
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return bytes([ord(character)]) if ord(character) < 256 else b"\xff"


def split_stories(text: str) -> list[str]:
    """Returns the finished stories of a text, each as its non-empty lines joined by one newline.

    `<|endoftext|>` ends a story. A text without that mark is cut before every paragraph that opens like a story.
    """
    text = repair(text)
    if SEPARATOR in text:
        stories = ["\n".join(_lines(part)) for part in text.split(SEPARATOR)]
    else:
        stories = []
        for line in _lines(text):
            if not stories or OPENING.match(line):
                stories.append(line)
            else:
                stories[-1] += "\n" + line
    return [story for story in stories if story.endswith((".", "!", "?", '"', "'"))]


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def read_corpus(data: Sequence[Path], valid: Path) -> tuple[list[str], list[str]]:
    """Returns training and validation stories, without duplicates and without training stories in the validation text.

    Raises:
        InputError: a file cannot be read or contains no story.
    """
    held_out = list(dict.fromkeys(_read_stories(valid)))
    held_out_text = "\n".join(held_out)
    stories = dict.fromkeys(story for path in data for story in _read_stories(path))
    return [story for story in stories if story not in held_out_text], held_out


def _read_stories(path: Path) -> list[str]:
    try:
        stories = split_stories(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    if not stories:
        raise InputError(f"{path} holds no finished story: separate stories by {SEPARATOR}")
    return stories


def train_tokenizer(stories: Iterable[str], vocabulary: int) -> bytes:
    """Trains a SentencePiece BPE model with Llama 2's ids: unknown 0, BOS 1, EOS 2, then 256 bytes, then pieces."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for story in stories for line in story.splitlines()),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.9999,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"the text is too short for a vocabulary of {vocabulary}: give more data") from error
    return model.getvalue()


def encode(tokenizer: sentencepiece.SentencePieceProcessor, stories: Iterable[str]) -> list[list[int]]:
    """Returns each story as BOS + tokens + EOS."""
    return [[BOS, *tokenizer.encode(story), EOS] for story in stories]


def pack(stories: Sequence[list[int]], length: int, seed: int) -> Iterator[list[int]]:
    """Yields rows of length + 1 tokens without end, in random order. A row starts with a story and cuts its last."""
    order = list(stories)
    shuffle = random.Random(seed).shuffle
    row: list[int] = []
    while True:
        shuffle(order)
        for story in order:
            row += story
            if len(row) > length:
                yield row[: length + 1]
                row = []
