import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from export import verify as command
from export.llama import export_llama
from export.planning.plan import ExportOptions
from export.quality.perplexity import most_tokens
from export.quality.report import FIELDS, page
from tests.conftest import TOY


@pytest.fixture(scope="module")
def exported(toy_options: ExportOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports TOY at 8 bits."""
    output = tmp_path_factory.mktemp("quality") / "toy.pte"
    export_llama(replace(toy_options, prefill_chunk=1, quantize="8da8w", max_ppl_increase=0.5, output=output))
    return output


def saved(exported: Path) -> dict[str, Any]:
    return json.loads(exported.with_name("toy.report.json").read_text())


def test_a_quantised_export_leaves_its_report(exported: Path) -> None:
    assert sorted(path.name for path in exported.parent.iterdir()) == ["toy.pte", "toy.report.html", "toy.report.json"]
    report = saved(exported)
    quality = report["quality"]
    assert report["passed"]
    assert report["file"] == {"name": "toy.pte", "bytes": exported.stat().st_size}
    assert report["scheme"]["linear"] == "8 bits a row"
    assert [loss["name"] for loss in quality["losses"]] == ["tok_embeddings", "layers.0", "layers.1", "head"]
    assert sum(quality["windows"]) == quality["quantised"]["tokens"] == quality["file"]["tokens"] == most_tokens(TOY)
    assert max(quality["windows"]) == TOY.context
    assert 0 < quality["file"]["mean_kl"] < quality["file_float32"]["mean_kl"]


def keys(value: Any, path: str = "") -> set[str]:
    if path in ("scheme", "provenance", "quality.losses[].linears") or not isinstance(value, (dict, list)):
        return {path}
    if isinstance(value, list):
        return set().union(*(keys(item, f"{path}[]") for item in value)) | ({f"{path}[]"} if value else set())
    found = {path} if path else set()
    for name, item in value.items():
        found |= keys(item, f"{path}.{name}".lstrip("."))
    return found


def test_every_key_of_the_json_is_explained(exported: Path) -> None:
    found = keys(saved(exported)) - {"file", "fidelity.limits", "quality.losses", "quality.windows", "quality.worst"}
    found -= {"quality.spans", "quality.losses[]"}
    comparisons = ("quantised", "file", "file_float32")
    explained = {
        field.replace("*", name) for field in FIELDS for name in (comparisons if "*" in field else comparisons[:1])
    }
    assert found == explained


class Page(HTMLParser):
    """A parser that checks the nesting of tags and collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], "", [], set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_lists_every_layer_and_loads_nothing(exported: Path) -> None:
    html = exported.with_name("toy.report.html").read_text()
    found = Page()
    found.feed(html)
    assert found.open == []
    for loss in saved(exported)["quality"]["losses"]:
        assert loss["name"] in found.text
        assert all(name in found.text for name in loss["linears"])
    assert found.tags >= {"svg", "polyline", "rect", "table"}
    assert not found.tags & {"script", "link", "img", "iframe"}
    assert not {name for name, _ in found.attributes} & {"src", "href", "onload", "xlink:href"}
    assert "//" not in html.replace("<!--", "")
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    numbers = [value for name, value in found.attributes if name in ("width", "x", "y", "cx", "cy") and value]
    assert len(numbers) > 50
    assert all(math.isfinite(float(value)) for value in numbers)


def test_the_page_escapes_names_and_allows_missing_numbers(exported: Path) -> None:
    report = saved(exported)
    report["file"]["name"] = "<b>&.pte"
    report["quality"]["text"] = "<i>mine</i>"
    report |= {"passed": False, "failure": "a < b"}
    report["quality"]["losses"][1]["own"] = report["quality"]["spans"][0]["kl"] = None
    html = page(report)
    assert "&lt;b&gt;&amp;.pte" in html
    assert "&lt;i&gt;mine" in html
    assert "a &lt; b" in html
    assert "<b>" not in html
    assert "<i>" not in html


def test_verify_alone_takes_the_gates_flags_and_writes_the_same_report(
    exported: Path, toy_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [exported.with_name(f"toy.report.{kind}") for kind in ("json", "html")]
    before = [path.read_bytes() for path in paths]
    arguments = [str(exported), "--checkpoint", str(toy_bin), "--report"]
    assert command.main([*arguments, "--max-ppl-increase", "0.5"]) == 0
    assert f"passed\n{paths[1]}\n" in capsys.readouterr().out
    assert [path.read_bytes() for path in paths] == before, "reports of equal files are equal"
    text = tmp_path / "mine.txt"
    text.write_text("The moon rose over the quiet lake, and nobody was there to see it.")
    try:
        assert command.main([*arguments, "--max-ppl-increase", "0", "--eval-text", str(text)]) == 1
        assert "FAILED: quantising costs too much" in capsys.readouterr().out
        assert saved(exported)["quality"]["text"] == "mine.txt"
        assert saved(exported)["quality"]["quantised"]["tokens"] < 40
    finally:
        for path, content in zip(paths, before, strict=True):
            path.write_bytes(content)
