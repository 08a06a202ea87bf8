import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from export.lowering.trace import GraphOptions
from export.quality.verification import verify
from export.weights.formats.integer import BYTE, Integer
from export.weights.scheme import Scheme
from model.errors import InputError
from runtime.atomic_file import replacing
from tests.conftest import TOY, planned, random_model, write_pte

FOUR = Integer(4, 32)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    with replacing(tmp_path / "new" / "a.pte") as temporary:
        temporary.write_bytes(b"new")
        assert names(tmp_path / "new") == [temporary.name]
    assert names(tmp_path / "new") == ["a.pte"]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert (tmp_path / "new" / "a.pte").stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_earlier_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.pte").write_bytes(b"old")

    def fail() -> None:
        with replacing(tmp_path / "a.pte") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["a.pte"]
    assert (tmp_path / "a.pte").read_bytes() == b"old"


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(Scheme(), marks=pytest.mark.slow),
        pytest.param(Scheme(BYTE, BYTE, BYTE), marks=pytest.mark.slow),
        Scheme(FOUR, FOUR, FOUR),
    ],
    ids=str,
)
def test_a_tied_matrix_is_stored_once_and_both_use_it(scheme: Scheme, tmp_path: Path) -> None:
    """Compares the file's size with an untied model's. Scales in groups are stored twice, as the head's are bfloat16
    and the embedding's float32.
    """
    models = [random_model(replace(TOY, hidden_dim=64, tied=tied)) for tied in (True, False)]
    models[1].head.output.weight.copy_(models[1].tok_embeddings.weight)
    files = []
    for model in models:
        plan = planned(model, GraphOptions(48, 1), scheme)
        files.append(write_pte(plan, tmp_path / f"{model.config.tied}.pte", "xnnpack"))
        assert verify(files[-1], plan.source).fidelity.passed
    saved = files[1].stat().st_size - files[0].stat().st_size
    matrix = scheme.head.nbytes(TOY.vocab_size, TOY.dim)
    scales = TOY.vocab_size * TOY.dim // 32 * 2 if scheme.head == FOUR else 0
    assert abs(saved - (matrix - scales)) < 2000, "beside the code that swaps pairs"


def test_a_folder_and_a_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, problem in ((tmp_path, "is a folder"), (tmp_path / "pipe", "is not a regular file")):
        with pytest.raises(InputError, match=problem), replacing(path):
            pass
    assert names(tmp_path) == ["pipe"]


def test_concurrent_writers_do_not_interfere(tmp_path: Path) -> None:
    script = f"""
        import os
        from pathlib import Path
        from runtime.atomic_file import replacing
        for i in range(100):
            with replacing(Path({str(tmp_path / "a[1].pte")!r})) as temporary:
                temporary.write_bytes(bytes([os.getpid() % 256]) * 1000)
    """
    call = [sys.executable, "-c", textwrap.dedent(script)]
    processes = [subprocess.Popen(call, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[1] for process in processes] == ["", "", ""]
    assert names(tmp_path) == ["a[1].pte"]
    assert len(set((tmp_path / "a[1].pte").read_bytes())) == 1


def test_only_dead_processes_temporary_files_are_removed(tmp_path: Path) -> None:
    script = f"""
        import sys, time
        from pathlib import Path
        from runtime.atomic_file import replacing
        with replacing(Path({str(tmp_path / "a.pte")!r})) as temporary:
            temporary.write_bytes(b"half")
            print(temporary.name, flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = process.stdout.readline().strip()
    with replacing(tmp_path / "a.pte") as temporary:
        assert names(tmp_path) == sorted([theirs, temporary.name])
        temporary.write_bytes(b"new")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert names(tmp_path) == sorted([theirs, "a.pte"])
    with replacing(tmp_path / "a.pte") as temporary:
        temporary.write_bytes(b"newer")
    assert names(tmp_path) == ["a.pte"]
    assert (tmp_path / "a.pte").read_bytes() == b"newer"
