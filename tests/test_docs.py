"""Checks README and docs/: their commands run, their tables match the code, and their links exist."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from export.checkpoints.families import FAMILIES
from runtime.cli.llama_pte import COMMANDS
from runtime.pte.metadata import FIELDS, FORMAT_VERSION
from tests.support.families import CASES

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
OTHERS = {str(path): (ROOT / path).read_text() for path in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}
ALL = DOCS | OTHERS
MOST_LINES = 150

SHARED = {
    "generate": ("sampling", "program"),
    "chat": ("sampling", "program"),
    "batch": ("sampling", "program"),
    "pipeline": ("sampling", "program"),
}
"""Commands -> their additional tables of flags."""


def folder_of(name: str) -> Path:
    """Returns the folder of a document."""
    return ROOT / "docs" if name in DOCS and name != "README.md" else ROOT


def blocks(name: str, language: str) -> list[str]:
    """Returns the code blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS[name], re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """Returns a document without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Returns the anchors of a document's headings, as used in links."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flag_tables() -> dict[str, set[str]]:
    """Returns the flags in each table that follows a mark such as <!-- flags: export -->."""
    found = re.findall(r"<!-- flags: (\w+) -->\n((?:\|.*\n)+)", "\n".join(DOCS.values()))
    assert len(found) == len({name for name, _ in found}), "a table is there twice"
    return {name: set(re.findall(r"^\| `(--[\w-]+)", table, re.MULTILINE)) for name, table in found}


def flags_of(module: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Returns the flags of a command's parser."""
    seen = list[argparse.ArgumentParser]()

    def parse(parser: argparse.ArgumentParser, *arguments: object) -> None:
        seen.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(SystemExit):
        import_module(module).main([])
    return {flag for action in seen[0]._actions for flag in action.option_strings} - {"-h", "--help"}


def test_the_readme_is_short_and_leads_to_every_document() -> None:
    assert len(DOCS["README.md"].splitlines()) <= MOST_LINES
    for name in DOCS.keys() - {"README.md"}:
        assert f"](docs/{name})" in DOCS["README.md"], name


def test_the_table_of_metadata_is_that_of_the_code() -> None:
    rows = "".join(f"| `{name}` | {kind} | {meaning} |\n" for name, (kind, meaning) in FIELDS.items())
    assert f"| method | type | meaning |\n|---|---|---|\n{rows}\n" in DOCS["file-format.md"]


def test_the_format_version_is_that_of_the_code() -> None:
    assert f"the format version (uint32, now {FORMAT_VERSION})" in DOCS["file-format.md"]


def test_every_make_target_named_is_there() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^)make ([\w-]+)", "\n".join(ALL.values()), re.MULTILINE)
    assert len(named) > 5
    assert set(named) <= set(targets)


def test_every_module_has_a_row_in_the_tree() -> None:
    found = set()
    for folder, section in re.findall(
        r"^### `([\w/]+/)`\n(.*?)(?=^#|\Z)", DOCS["architecture.md"], re.DOTALL | re.MULTILINE
    ):
        found |= {folder + name for name in re.findall(r"^\| `(\w+\.py)` \| .+ \|$", section, re.MULTILINE)}
    files = [path for package in ("export", "runtime", "preproc", "model") for path in (ROOT / package).rglob("*.py")]
    assert found == {str(path.relative_to(ROOT)) for path in files if path.stem != "__init__"}


def test_every_family_is_in_the_table_with_its_cases() -> None:
    rows = re.findall(r"^\| .+? \| `(\w+)` \| .+? \| (\d+) \|$", DOCS["families.md"], re.MULTILINE)
    cases = Counter(case.saved_as or case.architecture for case in CASES.values())
    assert {architecture: int(count) for architecture, count in rows} == cases
    assert cases.keys() == FAMILIES.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_flags_are_those_of_its_tables(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = flag_tables()
    documented = set[str]().union(*(tables[name] for name in (command, *SHARED.get(command, ()))))
    assert documented == flags_of(COMMANDS[command].module, monkeypatch)


def test_every_table_of_flags_belongs_to_a_command() -> None:
    assert flag_tables().keys() == {*COMMANDS, *(name for shared in SHARED.values() for name in shared)}


def test_the_runners_flags_differ_as_the_document_says(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = re.findall(r"<!-- only (?:python|c\+\+) -->((?:,?\s*`--[\w-]+`)+)", DOCS["cpp.md"])
    only_python, only_cpp = (set(re.findall(r"--[\w-]+", each)) for each in lists)
    source = (ROOT / "cpp_runner" / "src" / "cli" / "flags.cpp").read_text()
    flags = flags_of(COMMANDS["generate"].module, monkeypatch)
    assert only_python <= flags
    assert (flags - only_python) | only_cpp == set(re.findall(r'"(--[\w-]+)"', source))


@pytest.mark.parametrize("name", ALL)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(ALL[name])):
        path, _, anchor = target.partition("#")
        file = (folder_of(name) / path).resolve() if path else folder_of(name) / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("name", ALL)
def test_files_and_modules_named_are_there(name: str) -> None:
    for path in re.findall(
        r"\b(?:tests|export|runtime|model|preproc|cpp_runner|examples)/[\w/-]+\.\w+", prose(ALL[name])
    ):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", ALL[name]):
        assert find_spec(module), module


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DOCS if blocks(name, "sh") or blocks(name, "python")])
def test_every_command_and_example_runs_as_written(name: str, tiny_pte: Path, tmp_path: Path) -> None:
    """Runs the commands in a folder with a file of prompts and, unless the document itself makes it, the built-in
    model's file.
    """
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThe dog\n")
    if name not in ("README.md", "exporting.md"):
        shutil.copy(tiny_pte, tmp_path / "tiny.pte")
    script = tmp_path / "bin" / "llama-pte"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m runtime.cli.llama_pte "$@"\n')
    script.chmod(0o755)
    calls = list[list[str]]()
    for language, text in re.findall(r"^```(sh|python)\n(.*?)^```", DOCS[name], re.DOTALL | re.MULTILINE):
        calls += [["sh", "-c", line] for line in text.splitlines()] if language == "sh" else [["python", "-c", text]]
    path = os.pathsep.join([str(script.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    for call in calls:
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, (call, done.stderr)
        assert done.stdout.strip() or ">" in call[2], call
