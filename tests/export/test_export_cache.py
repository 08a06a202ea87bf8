from pathlib import Path
from unittest import mock

import pytest
import torch

from export.llama import export_llama
from export.lowering import export_cache, lower
from export.lowering.export_cache import ExportCache, default_folder
from export.planning.plan import ExportOptions
from export.quality import verification
from export.quality.perplexity import Gate
from export.quality.verification import verify_once
from export.weights.scheme import SCHEMES
from export.weights.source import WeightSource
from tests.conftest import TOY, random_options, toy_model

KEY = {"dim": 32, "kind": "before after"}
ENTRY = {"payload": torch.arange(5, dtype=torch.uint8), "arguments": [0, "before.wo.weight"], "results": [1, 0]}


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_an_entry_is_found_by_its_key_alone(tmp_path: Path) -> None:
    cache = ExportCache(tmp_path / "a" / "b")
    assert cache.get(KEY) is None
    cache.put(KEY, ENTRY)
    found = cache.get(dict(reversed(KEY.items())))
    assert found
    assert torch.equal(found.pop("payload"), ENTRY["payload"])
    assert found == {key: value for key, value in ENTRY.items() if key != "payload"}
    assert cache.get(KEY | {"dim": 33}) is None
    assert len(entries(tmp_path / "a" / "b")) == 1, "nothing temporary is left"


@pytest.mark.parametrize("what", ["source_digest", "versions"])
def test_other_code_and_other_versions_have_separate_entries(what: str, tmp_path: Path) -> None:
    cache = ExportCache(tmp_path)
    cache.put(KEY, ENTRY)
    with mock.patch.object(export_cache, what, return_value="another"):
        assert cache.get(KEY) is None


def test_a_damaged_or_truncated_entry_is_replaced(tmp_path: Path) -> None:
    cache = ExportCache(tmp_path)
    cache.put(KEY, ENTRY)
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    flipped = whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
    for data in (b"", whole[:10], whole[:-1], flipped):
        path.write_bytes(data)
        assert cache.get(KEY) is None
    cache.put(KEY, ENTRY)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ExportCache(tmp_path / "file" / "folder")
    cache.put(KEY, ENTRY)
    assert cache.get(KEY) is None


def test_without_a_folder_nothing_is_kept() -> None:
    cache = ExportCache(None)
    cache.put(KEY, ENTRY)
    assert cache.get(KEY) is None


def test_the_folder_is_where_caches_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/llama-pte")
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert default_folder() == Path.home() / ".cache" / "llama-pte"


def test_an_export_from_the_cache_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = random_options(TOY, tmp_path)

    def made(name: str, **others: object) -> tuple[bytes, int, int]:
        """Exports a file and returns its bytes, how many pieces were lowered, and whether it was verified."""
        with (
            mock.patch.object(lower, "_lowered", wraps=lower._lowered) as lowered,
            mock.patch.object(verification, "verify", wraps=verification.verify) as verified,
        ):
            path = export_llama(ExportOptions(**vars(options) | {"output": tmp_path / name} | others))  # type: ignore[arg-type]
        return path.read_bytes(), lowered.call_count, verified.call_count

    first, count, _ = made("first.pte")
    kept = sorted(entries(tmp_path / "cache" / "llama-pte"), key=lambda path: -path.stat().st_size)
    assert count + 1 == len(kept) > 2, "the last one says that the file passed"
    assert made("second.pte") == (first, 0, 0)
    kept[0].write_bytes(kept[0].read_bytes()[:-5])
    assert made("third.pte") == (first, 1, 0)
    kept[-1].write_bytes(kept[-1].read_bytes()[:-5])
    assert made("fourth.pte") == (first, 0, 1)
    assert made("fifth.pte", cache=False) == (first, count, 1)


def test_failed_files_and_those_of_other_processors_are_verified_again(toy_pte: Path, tmp_path: Path) -> None:
    cache, model = ExportCache(tmp_path / "cache"), toy_model()
    right, wrong = (
        WeightSource(model.config, weights, SCHEMES["fp32"]) for weights in (model.state_dict(), other_weights())
    )

    def verified(source: WeightSource) -> tuple[str | None, int]:
        with mock.patch.object(verification, "verify", wraps=verification.verify) as calls:
            return verify_once([toy_pte], source, Gate(), cache).failure, calls.call_count

    for _ in range(2):
        failure, count = verified(wrong)
        assert failure
        assert count == 1
    assert verified(right) == (None, 1)
    assert verified(right) == (None, 0)
    with mock.patch.object(verification, "_runtime_files", return_value=[]):
        assert verified(right) == (None, 1)
    with mock.patch.object(torch.backends.cpu, "get_cpu_capability", return_value="another"):
        assert verified(right) == (None, 1)


def other_weights() -> dict[str, torch.Tensor]:
    weights = dict(toy_model().state_dict())
    return weights | {"layers.0.attention.wq.weight": weights["layers.0.attention.wq.weight"] * 2}
