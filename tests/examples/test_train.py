"""Tests examples.train_tiny.train on toy text, and the built-in folder that it made."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import torch

from examples.train_tiny import train
from export.checkpoints.layouts import BUILT_IN, open_checkpoint
from model.config import ModelConfig
from model.model import Llama
from preproc import mask, rope

TINY = BUILT_IN
TOY = ModelConfig(16, 2, 4, 2, 4, 32, 24, 32, tied=True)
COUNTING = [[train.BOS, *((start + i) % 20 + 3 for i in range(12)), train.EOS] for start in range(20)]
OPTIONS = train.TrainOptions(steps=60, warmup=5, learning_rate=1e-2, every=20)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Limits torch to one thread, as toy matrices gain nothing from a second one and wait when other work holds its
    core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [train.learning_rate(step, OPTIONS) for step in range(OPTIONS.steps)]
    assert rates.index(max(rates)) in (4, 5)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_training_lowers_the_loss_and_repeats_exactly() -> None:
    runs = []
    for _ in range(2):
        model = Llama(TOY)
        states = list(train.train(model, COUNTING, COUNTING[:3], OPTIONS))
        runs.append(([(state.loss, state.valid_loss) for state in states], model.state_dict()))
    losses = runs[0][0]
    assert losses == runs[1][0]
    assert all(torch.equal(weight, runs[1][1][name]) for name, weight in runs[0][1].items())
    assert losses[-1][1] < 0.5 * math.log(TOY.vocab_size) < losses[0][0]


def test_training_loss_is_the_models_own() -> None:
    model = Llama(TOY)
    train.initialise(model, seed=0)
    row = torch.tensor([COUNTING[0]])
    L = row.shape[1] - 1
    cos, sin = rope.tables(TOY, L)
    masks = [mask.causal(0, L, 0)[None]] * TOY.n_layers
    logits = model(row[:, :-1], (cos[None], sin[None]), masks, torch.eye(L)[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, row[0, 1:])
    torch.testing.assert_close(train.row_loss(model, row, train.Positions.of(TOY)), expected)


def test_samples_depend_on_the_seed_alone() -> None:
    model = Llama(TOY)
    train.initialise(model, seed=0)
    both = train.sample(model, [3, 4], 12, 1.0)
    assert both[0] == train.sample(model, [3], 12, 1.0)[0] != both[1]
    assert [len(tokens) for tokens in both] == [12, 12]


def test_longest_copy() -> None:
    assert train.longest_copy([[9, 4, 5, 6, 9]], [[1, 4, 5], [6, 7]]) == 3
    assert train.longest_copy([[8, 9]], [[1, 2]]) == 0


def test_interrupted_write_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    train.write_folder(folder, {"a": b"old", "b": b"old"})
    (folder / "README.md").write_text("kept")
    write_bytes = Path.write_bytes

    def fail_on_b(path: Path, content: bytes) -> int:
        if path.name == "b":
            raise OSError("disk full")
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail_on_b)
        with pytest.raises(OSError, match="disk full"):
            train.write_folder(folder, {"a": b"new", "b": b"new"})
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a": "old", "b": "old", "README.md": "kept"}
    train.write_folder(folder, {"a": b"new", "b": b"new"})
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a": "new", "b": "new", "README.md": "kept"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_missing_and_empty_files_are_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("no end")
    for path in (tmp_path / "absent.txt", empty):
        assert train.main(["--data", str(path), "--valid", str(path)]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: {'cannot read ' if path != empty else ''}{path}")
        assert message.count("\n") == 1


@pytest.mark.parametrize("options", [["--steps", "0"], ["--threads", "x"], ["--preset", "huge"]])
def test_impossible_flags_exit_with_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--data", "a", "--valid", "b", *options])
    assert stop.value.code == 2
    assert options[1] in capsys.readouterr().err


def test_unusable_output_is_found_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Tom ran.")
    command = ["--data", str(text), "--valid", str(text), "--output"]
    assert train.main([*command, str(text)]) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert train.main([*command, str(tmp_path / "absent"), "--evaluate"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    assert "example:" in capsys.readouterr().out


def test_built_in_folder_is_small_and_whole() -> None:
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 5_000_000
    assert {file.name for file in TINY.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.model",
    }
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    assert tokenizer.vocab_size() == json.loads((TINY / "config.json").read_text())["vocab_size"]
    assert (tokenizer.bos_id(), tokenizer.eos_id()) == (train.BOS, train.EOS)
    text = 'Lily said, "I\'m 42!"\nThen: naïve 🙂.'
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = open_checkpoint(TINY).build()
    tokens = torch.randint(3, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    cos, sin = rope.tables(model.config, 64)
    masks = [mask.causal(0, 64, 0)[None]] * model.config.n_layers
    ours = model(tokens, (cos[None], sin[None]), masks, torch.eye(64)[None]).logits[0]
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
