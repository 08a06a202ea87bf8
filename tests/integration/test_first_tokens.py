"""Tests which token starts a text and which tokens end it, against transformers on the same folder."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

from export.planning.plan import ExportOptions, plan
from model.errors import InputError
from preproc.tokenizer import open_tokenizer
from tests.support.families import CASES, hugging_face_model

SPECIALS = ["<unk>", "<start>", "<end>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    hugging_face_model(CASES["Llama 2"]).save_pretrained(path)
    return path


def write_tokenizer(folder: Path, starts: bool, mark: str) -> None:
    """Writes a byte-level tokenizer whose post-processor puts <start> before a text if `starts`. `mark` is put before
    its settings, as a byte order mark.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    vocab = {text: number for number, text in enumerate([*SPECIALS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<start>", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(mark + json.dumps(named), encoding="utf-8")


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("config_bos", [None, 1, 2])
def test_the_post_processor_decides_which_token_starts_a_text(
    starts: bool, config_bos: int | None, model: Path
) -> None:
    write_tokenizer(model, starts, "")
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": config_bos}))
    planned = plan(ExportOptions(checkpoint=model, output=model / "x.pte"))
    bos = planned.provenance["bos_id"]
    assert planned.tokenizer
    ids = ([] if bos is None else [bos]) + planned.tokenizer.encode("hi there")
    assert ids == transformers.AutoTokenizer.from_pretrained(model)("hi there").input_ids


def test_the_eos_beside_a_given_tokenizer_ends_a_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, True, "\N{ZERO WIDTH NO-BREAK SPACE}")
    assert open_tokenizer(tmp_path / "tokenizer.json").stop_ids == (2,)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert open_tokenizer(tmp_path / "tokenizer.json").stop_ids == ()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<start>"}}')
    assert open_tokenizer(tmp_path / "tokenizer.json").stop_ids == (1,)
    (tmp_path / "special_tokens_map.json").write_text("{")
    with pytest.raises(InputError, match=r"special_tokens_map.json is not JSON"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_the_tokenizers_eos_is_the_default_stop_token(model: Path) -> None:
    write_tokenizer(model, True, "")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text()) | {"eos_token_id": None}
        (model / name).write_text(json.dumps(settings))
    options = ExportOptions(checkpoint=model, output=model / "x.pte")
    assert plan(options).provenance["stop_ids"] == [2]
    (model / "tokenizer_config.json").write_text("{}")
    planned = plan(options)
    assert planned.provenance["stop_ids"] == []
    assert any("the checkpoint names no token that ends a text" in warning for warning in planned.warnings)


def test_a_byte_order_mark_before_json_is_skipped(model: Path) -> None:
    write_tokenizer(model, True, "\N{ZERO WIDTH NO-BREAK SPACE}")
    for name in ("config.json", "generation_config.json"):
        path = model / name
        path.write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + path.read_text().lstrip("\N{ZERO WIDTH NO-BREAK SPACE}"))
    assert plan(ExportOptions(checkpoint=model, output=model / "x.pte")).provenance["bos_id"] == 1


def write_settings(folder: Path, **files: object) -> None:
    """Writes JSON files, given by their names without .json."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a SentencePiece model with a smaller vocabulary than the models in these tests."""
    folder = tmp_path_factory.mktemp("pieces")
    text = folder / "text.txt"
    text.write_text("\n".join(f"the {word} of a {word}s" for word in ("cat", "dog", "bird", "tree", "house")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "small"), vocab_size=40, model_type="bpe", minloglevel=9
    )
    return folder / "small.model"


@pytest.fixture
def bare(model: Path, tmp_path: Path) -> Path:
    """Returns a model folder without a tokenizer."""
    folder = tmp_path / "bare"
    shutil.copytree(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("adds", [None, True, False])
def test_tokenizer_config_decides_whether_a_sentencepiece_text_starts_with_bos(
    adds: bool | None, bare: Path, small: Path
) -> None:
    shutil.copy(small, bare / "tokenizer.model")
    write_settings(bare, tokenizer_config={"bos_token": "<s>"} | ({} if adds is None else {"add_bos_token": adds}))
    planned = plan(ExportOptions(checkpoint=bare, output=bare / "x.pte"))
    assert planned.provenance["bos_id"] == (None if adds is False else 1)


@pytest.mark.parametrize("place", ["added_tokens", "tokenizer_config"])
def test_added_tokens_that_a_sentencepiece_model_lacks_are_named(place: str, bare: Path, small: Path) -> None:
    def added(text: str, number: int) -> dict[str, object]:
        listed: dict[str, object] = {"added_tokens_decoder": {str(number): {"content": text}}}
        return {text: number} if place == "added_tokens" else listed

    shutil.copy(small, bare / "tokenizer.model")
    write_settings(bare, **{place: added("<|im_end|>", 40)})
    message = r"tokenizer.model lacks <\|im_end\|>, which added_tokens.json or .* add; save a tokenizer.json there: "
    with pytest.raises(InputError, match=message):
        plan(ExportOptions(checkpoint=bare, output=bare / "x.pte"))
    write_settings(bare, **{place: added("<s>", 1)})
    assert plan(ExportOptions(checkpoint=bare, output=bare / "x.pte")).tokenizer


def test_a_vocabulary_and_merges_are_refused_with_the_converter(bare: Path) -> None:
    write_settings(bare, vocab={"a": 0})
    (bare / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match=r"has its tokenizer only as vocab.json and merges.txt; save a tokenizer.json"):
        plan(ExportOptions(checkpoint=bare, output=bare / "x.pte"))


def test_stop_tokens_are_read_from_three_files(bare: Path) -> None:
    write_tokenizer(bare, True, "")
    config = json.loads((bare / "config.json").read_text(encoding="utf-8-sig"))
    write_settings(bare, config=config | {"eos_token_id": 5}, generation_config={"eos_token_id": [7, 5]})
    assert plan(ExportOptions(checkpoint=bare, output=bare / "x.pte")).provenance["stop_ids"] == [7, 5, 2]


@pytest.mark.parametrize("starts", [True, False])
def test_a_given_tokenizer_decides_which_token_starts_a_text(starts: bool, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    write_tokenizer(tmp_path / "given", starts, "")
    file = tmp_path / "given" / "tokenizer.json"
    planned = plan(ExportOptions(checkpoint=bare, tokenizer=file, output=bare / "x.pte"))
    assert planned.provenance["bos_id"] == (1 if starts else None)
