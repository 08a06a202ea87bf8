"""Changes numbers in files and makes the checksum right again, as whoever wants to harm may do: both runtimes give an
error or run, and none ends by a signal.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from export.planning.plan import ExportOptions
from runtime.pte.trailer import Trailer
from tests.conftest import MODELS, ROOT, exported
from tests.support.flatbuffers import changed, numbers

TRAILER_BYTES = 32
FLAGS = ["--prompt-ids", "1,5,9", "--max-new-tokens", "3"]


def outcomes(path: Path, call: list[str | Path], folder: Path, count: int) -> Counter[int]:
    """Runs a command on `count` changed copies of a file, and returns how often it ended with each code."""
    program, random, found = path.read_bytes()[:-TRAILER_BYTES], Random(7), Counter[int]()
    places = numbers(program)
    for i in range(count):
        hostile = changed(program, places, random)
        trailer = Trailer()
        trailer.add(hostile)
        copy = folder / f"{i}.pte"
        copy.write_bytes(hostile + trailer.pack())
        done = subprocess.run([*call, copy, *FLAGS], capture_output=True, cwd=ROOT, check=False, timeout=120)
        found[done.returncode] += 1
        if done.returncode not in (0, 2):
            print(copy, done)
            continue
        copy.unlink()
    return found


@pytest.mark.parametrize("count", [400, pytest.param(3000, marks=pytest.mark.slow)])
def test_the_runner_survives_hostile_files(count: int, runner: Path, toy_pte: Path, tmp_path: Path) -> None:
    found = outcomes(toy_pte, [runner], tmp_path, count)
    assert set(found) == {0, 2}
    assert found[2] > count / 2, "most changes are noticed"


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["8da4w", "q4_0"])
def test_the_runner_survives_hostile_quantised_files(quantize: str, runner: Path, tmp_path: Path) -> None:
    path = exported(ExportOptions(max_seq_len=512, quantize=quantize, output=MODELS / f"tiny-{quantize}.pte"))
    assert set(outcomes(path, [runner], tmp_path, 1500)) == {0, 2}


@pytest.mark.slow
def test_python_survives_hostile_files(toy_pte: Path, tmp_path: Path) -> None:
    found = outcomes(toy_pte, [sys.executable, "-m", "runtime.generate"], tmp_path, 60)
    assert set(found) <= {0, 2}
