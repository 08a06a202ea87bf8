"""Tests the console script, which runs the command that its first argument names."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from runtime.cli.llama_pte import COMMANDS, main

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, "-c", "import sys; from runtime.cli.llama_pte import main; sys.exit(main())"]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_it_lists_all_with_a_line_each(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["llama-pte", *arguments])
    assert main() == 0
    assert re.findall(r"^  (\w+) +\S.*$", capsys.readouterr().out, re.MULTILINE) == list(COMMANDS)


def test_an_unknown_command_is_bad_input_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["llama-pte", "exprot", "--force"])
    assert main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: exprot is not a sub-command of llama-pte; choose from export, verify, ")
    assert said.err.count("\n") == 1


def test_every_module_that_is_a_command_is_a_sub_command() -> None:
    commands = {
        f"{folder}.{path.stem}"
        for folder in ("export", "runtime")
        for path in (ROOT / folder).glob("*.py")
        if "command.start(" in path.read_text()
    }
    assert {command.module for command in COMMANDS.values()} == commands
    assert all(find_spec(module) for module in commands)


def test_pyproject_installs_it() -> None:
    assert '\n[project.scripts]\nllama-pte = "runtime.cli.llama_pte:main"\n' in (ROOT / "pyproject.toml").read_text()


def test_help_names_the_command_as_called() -> None:
    done = run("inspect", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: llama-pte inspect ")
    assert "\n  llama-pte inspect tiny.pte --format json\n" in done.stdout
    assert "python -m" not in done.stdout


def test_a_sub_command_takes_the_other_arguments_and_gives_its_exit_code(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing.pte")
    done = run("inspect", missing, "--format", "json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {missing} is not a file; ")
