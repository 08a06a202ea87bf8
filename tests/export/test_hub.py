"""Tests checkpoints named on the Hugging Face Hub: the hub's library with a prepared cache, and its errors."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file

from export import verify
from export.checkpoints import hub
from export.checkpoints.layouts import open_checkpoint
from export.llama import ExportOptions, export_llama
from export.planning.plan import plan
from model.errors import InputError
from tests.support.families import CASES, hugging_face_model

NAME = Path("some-org/Small-Llama-3.2")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Writes the files of a model repository."""
    folder = tmp_path / "model"
    hugging_face_model(CASES["Llama 2"]).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepares a cache that holds the model, and disables the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--some-org--Small-Llama-3.2"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path / "cache"


def test_a_name_is_opened_from_the_cache(cache: Path, model: Path) -> None:
    found = open_checkpoint(NAME, cache_dir=cache)
    assert found.digest() == open_checkpoint(model).digest()


def test_a_name_is_exported_and_names_the_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ExportOptions(NAME, Path("none"), max_seq_len=8, prefill_chunk=1, backend="portable", cache_dir=cache)
    assert export_llama(options) == Path("Small-Llama-3.2.pte")
    assert Path("Small-Llama-3.2.pte").is_file()


def test_a_token_is_passed_on_and_shown_nowhere(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[dict[str, Any]]()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *name, **how: asked.append(how) or str(model))
    options = ExportOptions(NAME, Path("none"), max_seq_len=8, hub_token="hf_secret", cache_dir=Path("there"))
    planned = plan(options)
    assert (asked[0]["token"], asked[0]["cache_dir"]) == ("hf_secret", Path("there"))
    assert "hf_secret" not in f"{options} {planned.provenance}"


def test_verify_looks_for_a_name_as_export_does(toy_pte: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[dict[str, Any]]()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *name, **how: asked.append(how) or str(model))
    flags = ["--checkpoint", str(NAME), "--hub-token", "hf_secret", "--cache-dir", "there"]
    with pytest.raises(InputError, match="the file was made from another model"):
        verify.main([str(toy_pte), *flags])
    assert (asked[0]["token"], asked[0]["cache_dir"]) == ("hf_secret", Path("there"))


def test_pickled_weights_are_downloaded_only_without_safetensors(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    for other in ("consolidated.safetensors", "consolidated.00.pth", "README.md", "tokenizer.model"):
        (model / other).touch()
    taken = list[set[str]]()

    def download(name: str, allow_patterns: list[str], **others: object) -> str:
        wanted = [file for pattern in allow_patterns for file in model.glob(pattern)]
        taken.append({file.name for file in wanted})
        folder = tmp_path / f"snapshot-{len(taken)}"
        folder.mkdir()
        for file in wanted:
            shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    settings = {"config.json", "generation_config.json", "tokenizer.model"}
    expected = open_checkpoint(NAME).build().state_dict()
    assert taken == [settings | {"model.safetensors"}]
    (model / "model.safetensors").unlink()
    found = open_checkpoint(NAME).build().state_dict()
    assert taken[1:] == [settings, settings | {"pytorch_model.bin"}]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (lambda: errors.GatedRepoError("403", response=Mock()), "is gated; accept its licence at https://hugging"),
        (
            lambda: errors.RepositoryNotFoundError("404", response=Mock()),
            "neither an existing path nor a model on the Hugging",
        ),
        (lambda: errors.LocalEntryNotFoundError("offline"), "the Hugging Face hub cannot be reached"),
        (lambda: ConnectionError("reset by peer\nand more"), r"could not be downloaded .*\(reset by peer\); try again"),
    ],
)
def test_download_errors_are_one_sentence(raised: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*name: object, **others: object) -> str:
        raise raised()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=message) as caught:
        plan(ExportOptions(NAME))
    assert str(caught.value).startswith(str(NAME))
    assert "\n" not in str(caught.value)


def test_a_missing_network_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be reached, and its cache is incomplete"):
        hub.download(NAME, cache=tmp_path)


@pytest.mark.parametrize("name", ["absent", "/absent/model", "a/b/c", "../a", "org/", "a/here", "a b/c"])
def test_only_a_name_that_is_no_path_is_looked_up(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_name(NAME)
    assert not hub.is_hub_name(Path(name))
