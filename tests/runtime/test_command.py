import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export import inspect as inspect_command
from runtime.cli import command

ROOT = Path(__file__).parents[2]


def loads(process: "subprocess.Popen[str]", library: str) -> bool:
    """Waits until a process loads a library; returns False if it ends before."""
    for _ in range(3000):
        if process.poll() is not None:
            return False
        if library in Path(f"/proc/{process.pid}/maps").read_text():
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize("module", ["runtime.generate", "export.inspect"])
def test_an_interrupt_while_libraries_load_is_quiet(module: str) -> None:
    call = [sys.executable, "-m", module, "nothing.pte"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert loads(process, "libtorch_cpu")
    process.send_signal(signal.SIGINT)
    out, error = process.communicate()
    assert (process.returncode, out, error) == (128 + signal.SIGINT, "", "")


def test_a_command_that_is_started_reports_bad_input_in_one_sentence() -> None:
    call = [sys.executable, "-m", "export.inspect", "nothing.pte"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nothing.pte is not a file; export one with `python -m export.llama`\n"


def test_help_ends_with_the_examples_of_the_docstring() -> None:
    doc = """Says it.

    python -m some.module file
        python -m some.module --flag file
    """
    parser = command.parser("some.module", "Does it.", doc)
    assert isinstance(parser, argparse.ArgumentParser)
    assert parser.prog == "python -m some.module"
    assert parser.format_help().endswith(
        "\nexamples:\n  python -m some.module file\n  python -m some.module --flag file\n"
    )


def test_every_example_of_inspect_is_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inspect_command.main(["--help"])
    assert "\n  python -m export.inspect tiny.pte --format json\n" in capsys.readouterr().out
