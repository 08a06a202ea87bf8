"""Tests examples.train_tiny.stories on toy text."""

import itertools
from pathlib import Path

import pytest

from examples.train_tiny import stories
from model.errors import InputError

ROWS = [[stories.BOS, *((start + i) % 20 + 3 for i in range(12)), stories.EOS] for start in range(20)]


def test_separator_ends_stories_and_blank_lines_do_not() -> None:
    text = "\nTom ran.\n\n  He fell. \n<|endoftext|>\nAnn sat.\n<|endoftext|>\nBen was on his w"
    assert stories.split_stories(text) == ["Tom ran.\nHe fell.", "Ann sat."]


def test_text_without_separator_is_cut_at_openings() -> None:
    text = "A tail.\n\nOnce upon a time, a cat sat.\n\nOne day, it rained.\n\nOne day, a dog came.\n\nIt barked.\n"
    assert stories.split_stories(text) == [
        "A tail.",
        "Once upon a time, a cat sat.\nOne day, it rained.",
        "One day, a dog came.\nIt barked.",
    ]


@pytest.mark.parametrize("original", ["“Hi,” said Tom – it’s ‘me’.", "café ñandú", "plain"])
def test_mojibake_is_repaired(original: str) -> None:
    undefined = (0x81, 0x8D, 0x8F, 0x90, 0x9D)
    broken = "".join(chr(b) if b in undefined else bytes([b]).decode("cp1252") for b in original.encode())
    assert stories.repair(broken) == stories.repair(original)
    assert stories.repair(original).isascii() == (original != "café ñandú")


def test_corpus_drops_duplicates_and_validation_stories(tmp_path: Path) -> None:
    data, valid = tmp_path / "data.txt", tmp_path / "valid.txt"
    data.write_text("Tom ran.<|endoftext|>Ann sat.<|endoftext|>Tom ran.<|endoftext|>")
    valid.write_text("Once there was Bo.\n\nAnn sat.\n")
    assert stories.read_corpus([data], valid) == (["Tom ran."], ["Once there was Bo.\nAnn sat."])


def test_packed_rows_start_with_a_story_and_have_one_length() -> None:
    rows = list(itertools.islice(stories.pack(ROWS, 32, seed=0), 50))
    assert {len(row) for row in rows} == {33}
    assert {row[0] for row in rows} == {stories.BOS}
    assert rows == list(itertools.islice(stories.pack(ROWS, 32, seed=0), 50))
    assert rows != list(itertools.islice(stories.pack(ROWS, 32, seed=1), 50))


def test_too_little_text_for_the_vocabulary() -> None:
    with pytest.raises(InputError, match="too short for a vocabulary of 2048"):
        stories.train_tokenizer(["Tom ran."], 2048)
