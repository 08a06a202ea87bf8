"""Runs the example programs as they are. The JNI sample is compiled in tests/integration/test_cpp_runner.py."""

import re
import subprocess
from pathlib import Path

import pytest

from examples import library, openai_client
from runtime import serve
from tests.conftest import BUILD, ROOT
from tests.support.serving import serving

CMAKE = ROOT / ".venv" / "bin" / "cmake"


def test_library_continues_a_prompt_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library.main(tmp_path)
    assert (tmp_path / "tiny.pte").is_file()
    told = capsys.readouterr().out
    assert len(told) > 100
    library.main(tmp_path)  # the file exists already, and the seeds are the same
    assert capsys.readouterr().out == told


def test_openai_client_completes_and_chats(tiny_pte: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(serve.open_model(tiny_pte, "llama2")) as server:
        openai_client.main(server.url)
    completion, answer = capsys.readouterr().out.split("\n", 1)
    assert len(completion.split()) > 10
    assert len(answer.split()) > 3


@pytest.mark.slow
def test_cpp_builds_over_the_installed_library(runner: Path, tiny_pte: Path, tmp_path: Path) -> None:
    installed, built = tmp_path / "installed", tmp_path / "built"
    for step in (
        ["--install", BUILD, "--prefix", installed],
        ["-S", ROOT / "examples" / "cpp", "-B", built, f"-DCMAKE_PREFIX_PATH={installed}"],
        ["--build", built],
    ):
        done = subprocess.run([CMAKE, *step], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    call = [built / "story", tiny_pte, "Once upon a time"]
    told = subprocess.run(call, capture_output=True, text=True, check=True)
    assert len(told.stdout.split()) > 50
    call = [installed / "bin" / "llama_runner", tiny_pte, "--prompt", "Once", "--max-new-tokens", "5"]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout
    wrong = subprocess.run([built / "story", "nothing.pte", "Once"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: nothing.pte does not exist; ")


def test_cpp_is_versioned_with_the_package() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert f"\n  VERSION {version[1]}\n" in (ROOT / "cpp_runner" / "CMakeLists.txt").read_text()
