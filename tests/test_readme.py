"""The README says what is so."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from export.checkpoints.families import FAMILIES
from runtime.pte.metadata import FIELDS, FORMAT_VERSION
from tests.support.families import CASES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_table_of_what_a_file_carries_is_the_contracts() -> None:
    rows = re.findall(r"^\| `(get_\w+|use_\w+)` \| (.+?) \| (.+?) \|$", README, re.MULTILINE)
    assert {name: (kind, meaning) for name, kind, meaning in rows} == FIELDS


def test_the_format_version_is_the_contracts() -> None:
    assert f"the format version (uint32, now {FORMAT_VERSION})" in README


def test_every_make_target_named_is_there() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^)make ([\w-]+)", README, re.MULTILINE)
    assert len(named) > 5
    assert set(named) <= set(targets)


@pytest.mark.parametrize("folder", ["export", "runtime"])
def test_every_module_is_in_its_folders_row(folder: str) -> None:
    modules = [path.stem for path in (ROOT / folder).rglob("*.py") if path.stem != "__init__"]
    assert len(modules) > 8
    for module in modules:
        assert re.search(rf"^\| `{folder}/` .*`{module}`", README, re.MULTILINE), module


def test_every_family_is_in_the_table_with_its_cases() -> None:
    rows = re.findall(r"^\| .+? \| `(\w+)` \| .+? \| (\d+) \|$", README, re.MULTILINE)
    cases = Counter(case.architecture for case in CASES.values())
    assert {architecture: int(count) for architecture, count in rows} == cases
    assert cases.keys() == FAMILIES.keys()


@pytest.mark.slow
def test_every_command_and_example_runs_as_written(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThe dog\n")
    commands = [
        line for block in blocks("sh") for line in block.splitlines() if line.startswith(("python ", "torchrun "))
    ]
    assert len(commands) >= 9
    calls = [["sh", "-c", line] for line in commands] + [[sys.executable, "-c", block] for block in blocks("python")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for call in calls:
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert done.returncode == 0, (call, done.stderr)
        assert done.stdout.strip() or ">" in call[2]
