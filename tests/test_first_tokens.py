"""What a text starts with and what ends it: as transformers makes of the same folder."""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

from export.plan import ExportOptions, plan
from tests.families import CASES, hugging_face_model

SPECIALS = ["<unk>", "<start>", "<end>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    hugging_face_model(CASES["Llama 2"]).save_pretrained(path)
    return path


def write_tokenizer(folder: Path, starts: bool, mark: str) -> None:
    """A byte-level tokenizer; its post-processor may put <start> before a text. `mark` stands before its settings."""
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
def test_the_post_processor_decides_what_starts_a_text(starts: bool, config_bos: int | None, model: Path) -> None:
    write_tokenizer(model, starts, "")
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": config_bos}))
    planned = plan(ExportOptions(checkpoint=model, output=model / "x.pte"))
    bos = planned.provenance["bos_id"]
    assert planned.tokenizer
    ids = ([] if bos is None else [bos]) + planned.tokenizer.encode("hi there")
    assert ids == transformers.AutoTokenizer.from_pretrained(model)("hi there").input_ids


def test_the_tokenizers_eos_ends_a_text_where_nothing_else_says_what_does(model: Path) -> None:
    write_tokenizer(model, True, "")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text()) | {"eos_token_id": None}
        (model / name).write_text(json.dumps(settings))
    assert plan(ExportOptions(checkpoint=model, output=model / "x.pte")).provenance["stop_ids"] == [2]


def test_a_byte_order_mark_before_json_is_skipped(model: Path) -> None:
    write_tokenizer(model, True, "\N{ZERO WIDTH NO-BREAK SPACE}")
    for name in ("config.json", "generation_config.json"):
        path = model / name
        path.write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + path.read_text().lstrip("\N{ZERO WIDTH NO-BREAK SPACE}"))
    assert plan(ExportOptions(checkpoint=model, output=model / "x.pte")).provenance["bos_id"] == 1
