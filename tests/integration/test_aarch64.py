"""Tests the C++ runner's build for ARM, under qemu."""

import shutil
import subprocess
from pathlib import Path

import pytest

from export.llama import export_llama
from export.planning.plan import ExportOptions
from tests.conftest import ROOT

AARCH64 = ROOT / "build" / "aarch64-linux"
CMAKE = ROOT / ".venv" / "bin" / "cmake"
CROSS_ROOT = Path("/usr/aarch64-linux-gnu")


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def aarch64() -> list[str | Path]:
    """Returns the command that runs the ARM build."""
    for tool in ("qemu-aarch64-static", "aarch64-linux-gnu-g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}; make runner-aarch64 installs it")
    for command in (["--preset", "aarch64-linux"], ["--build", str(AARCH64), "-j2", "--target", "deploy"]):
        subprocess.run([CMAKE, *command], cwd=ROOT / "cpp_runner", check=True, capture_output=True)
    # The libraries of the cross compiler, independent of installed arm64 packages.
    qemu = ["qemu-aarch64-static", "-L", CROSS_ROOT, "-E", f"LD_LIBRARY_PATH={CROSS_ROOT / 'lib'}"]
    return [*qemu, AARCH64 / "deploy" / "llama_runner"]


@pytest.mark.slow
def test_prints_what_llama2_c_prints(aarch64: list[str | Path], stories_pte: Path, shared: Path) -> None:
    done = _run(*aarch64, stories_pte, "--max-new-tokens", "200")
    assert done.stdout == (shared / "stories260K" / "greedy-200.txt").read_text(), done.stderr


@pytest.mark.slow
def test_runs_four_bit_weights_as_this_machine_does(aarch64: list[str | Path], runner: Path, tmp_path: Path) -> None:
    """Tests 4-bit weights in groups of 32 with 8-bit activations, which have their own kernels on ARM."""
    output = tmp_path / "quantised.pte"
    export_llama(ExportOptions(max_seq_len=512, prefill_chunk=8, quantize="8da4w", output=output))
    flags = [output, "--prompt", "Once upon a time", "--max-new-tokens", "40"]
    here, there = _run(runner, *flags), _run(*aarch64, *flags)
    assert len(here.stdout.split()) > 20
    assert there.stdout == here.stdout, there.stderr


@pytest.mark.slow
def test_multiplies_by_blocks_as_every_cpu_does(aarch64: list[str | Path], tmp_path: Path) -> None:
    """Runs the kernels' tests on ARM, which compare all instruction sets that qemu has, bit for bit."""
    (wheel,) = (AARCH64.parent / "third_party").glob("aarch64-*/executorch")
    google, source = Path("/usr/src/googletest/googletest"), ROOT / "cpp_runner" / "src"
    include = (source, ROOT / "cpp_runner" / "include", google, google / "include", wheel / "include")
    include += (wheel / "include" / "executorch" / "runtime" / "core" / "portable_type" / "c10",)
    files = [ROOT / "tests" / "cpp" / "test_linear.cpp", *(source / "linear").glob("*.cpp")]
    files += [google / "src" / "gtest-all.cc", google / "src" / "gtest_main.cc"]
    flags = ["-std=c++20", "-O2", "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL"]
    flags += [*(f"-I{folder}" for folder in include), f"-L{wheel / 'lib'}", "-o", str(tmp_path / "tests")]
    libraries = ["-lexecutorch", "-lexecutorch_threadpool", f"-Wl,-rpath,{wheel / 'lib'}"]
    made = _run("aarch64-linux-gnu-g++", *files, *flags, *libraries)
    assert made.returncode == 0, made.stderr
    done = _run(*aarch64[:-1], tmp_path / "tests")
    assert done.returncode == 0, done.stdout
    assert "IsTheSameOnEveryCpu/NeonI8mm" in done.stdout
