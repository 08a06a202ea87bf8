"""Exports a small model for every backend, and compares its logits where the backend runs on this machine."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.inspect import main as inspect_main
from export.llama import Progress, export_llama
from export.llama import main as export_main
from export.lowering import backends
from export.lowering.backends import BACKENDS, check, lowering, partitioners, quietly
from export.lowering.trace import step
from export.module import export_module
from export.planning.plan import ExportOptions, plan
from model.errors import InputError
from preproc.position_inputs import Positions, names
from runtime.engine.executorch import lacking
from runtime.engine.program import Program, read_metadata
from runtime.engine.session import Session
from tests.conftest import TOY, random_model
from tests.support.checkpoints import write_llama2c

ROOT = Path(__file__).parents[2]
SMALL = replace(TOY, n_layers=1, vocab_size=256)
RUN_HERE = ("xnnpack", "portable", "openvino")
NOT_RUN_HERE = ("vulkan", "coreml")
EMBEDDING = "aten::embedding.out"
OUTSIDE = {"xnnpack": (EMBEDDING, "llama_pte::attention.out"), "openvino": (), "vulkan": (), "coreml": ()}
"""Kernels that each backend leaves to the runtime."""
REFUSED = {
    "ethos-u": r"--backend ethos-u needs activations quantised to 8 bits with calibrated ranges",
    "qnn": r"--backend qnn needs Qualcomm's AI Engine Direct SDK \(QNN\), which is on .*, not on PyPI",
    "mediatek": r"--backend mediatek needs .*NeuroPilot Express SDK, which are on .*, not on PyPI",
    "samsung": r"--backend samsung needs Samsung's Exynos AI LiteCore SDK, which is on Samsung's site.*, not on PyPI",
    "nxp": r"--backend nxp needs NXP's eIQ Neutron SDK, which is on NXP's eIQ site, not on PyPI",
}


@dataclass
class Exported(Progress):
    """An exported file, and the progress messages of its export."""

    path: Path = Path()
    said: dict[str, list[str]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        yield self.said.setdefault(name, [])


MADE: dict[tuple[str, int], Exported] = {}


def exported(backend: str, options: ExportOptions, folder: Path, chunk: int = 1) -> Exported:
    """Exports a random model for a backend, once. Skips the test if the backend's extra is not installed."""
    if missing := [package for package in BACKENDS[backend].packages if find_spec(package) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: pip install 'llama-pte[{backend}]'")
    if (backend, chunk) not in MADE:
        made = Exported(folder / f"{backend}-{chunk}.pte")
        export_llama(replace(options, backend=backend, prefill_chunk=chunk, output=made.path), made)
        MADE[backend, chunk] = made
    return MADE[backend, chunk]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backends")


@pytest.fixture(scope="module")
def options(folder: Path) -> ExportOptions:
    """Returns the export options of a random model with one block."""
    return ExportOptions(write_llama2c(random_model(SMALL), folder / "small.bin", version=1), Path("none"))


def test_every_backend_is_tested() -> None:
    assert [*RUN_HERE, *NOT_RUN_HERE] == lowering()
    assert [*lowering(), *REFUSED] == list(BACKENDS)


@pytest.mark.parametrize("backend", [*RUN_HERE, *NOT_RUN_HERE])
def test_a_small_model_is_lowered_and_the_file_names_its_backend(
    backend: str, options: ExportOptions, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, runtime = exported(backend, options, folder).path, BACKENDS[backend].runtime
    metadata = read_metadata(path)
    assert metadata.provenance["options"]["backend"] == backend
    assert metadata.provenance["verified"] == (backend in RUN_HERE)
    assert metadata.requirements.backends == ((runtime,) if runtime else ())
    if backend in OUTSIDE:
        assert metadata.requirements.operators == OUTSIDE[backend], "all else is the backend's"
    capsys.readouterr()
    assert inspect_main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^backend +{backend}\b", shown, re.MULTILINE)
    assert ("not verified" in shown) == (backend in NOT_RUN_HERE)
    assert runtime in next(line for line in shown.splitlines() if line.startswith("needs"))


@pytest.mark.parametrize("backend", RUN_HERE)
def test_logits_are_those_of_the_eager_model(backend: str, options: ExportOptions, folder: Path) -> None:
    session = Session(Program(exported(backend, options, folder).path))
    text = [1, 17, 42, 99, 5, 6, 7, 8, 150, 3, 77, 12]
    found = torch.stack([session.decode(token) for token in text])
    torch.testing.assert_close(found, eager(text), atol=1e-4, rtol=0)


def eager(text: list[int]) -> Tensor:
    """Returns the model's logits [L, V], computed without caches."""
    model, positions = random_model(SMALL), Positions.of(SMALL, SMALL.context)
    inputs = {name: positions.make(name, 0, len(text), capacity=0) for name in names(SMALL)}
    return step(model, inputs | {"tokens": torch.tensor([text]), "select": torch.eye(len(text))[None]})["logits"][0]


@pytest.mark.parametrize("backend", NOT_RUN_HERE)
def test_backends_that_cannot_run_here_are_reported_and_refused(
    backend: str, options: ExportOptions, folder: Path
) -> None:
    made, runtime = exported(backend, options, folder), BACKENDS[backend].runtime
    assert made.said["verify"] == [f"skipped: ExecuTorch on this machine lacks {runtime}; check the file on the device"]
    assert lacking([runtime]) == {runtime}
    with pytest.raises(InputError, match=f"needs {runtime}, which"):
        Program(made.path)
    with pytest.raises(InputError, match=f"{runtime} is not on this machine, so the file cannot be verified"):
        export_module(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), folder / "a.pte", backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", *NOT_RUN_HERE])
def test_prefill_and_decode_are_one_delegate_each(backend: str, options: ExportOptions, folder: Path) -> None:
    made = exported(backend, options, folder, chunk=7)
    assert [method.name for method in read_metadata(made.path).methods] == ["decode", "prefill"]
    assert made.said["assemble"][0].startswith("2 delegates")
    assert ("skipped" in made.said["verify"][0]) == (backend in NOT_RUN_HERE)


@pytest.mark.parametrize("backend", REFUSED)
def test_a_backend_that_cannot_be_lowered_names_what_it_lacks(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=REFUSED[backend] + ".*; choose from xnnpack, portable") as caught:
        export_main(["--backend", backend])
    with pytest.raises(InputError, match=REFUSED[backend]):
        partitioners(backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", [name for name in lowering() if BACKENDS[name].packages])
def test_a_missing_package_is_named_with_its_install_command(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = BACKENDS[backend].packages
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    command = rf"run: pip install 'llama-pte\[{backend}\]'"
    with pytest.raises(InputError, match=f"{backend} needs {' and '.join(packages)}, which .*{command}"):
        check(backend)
    project = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(rf"^{backend} = \[(.*)\]", project, re.MULTILINE)
    assert [re.match(r"[\w-]+", item.strip(' "'))[0] for item in extra.split(",") if item.strip()[0] == '"'] == list(
        packages
    )


@pytest.mark.parametrize("how", [{"quantize": "8da4w"}, {"head_bits": 8}])
def test_only_backends_with_quantised_layers_are_given_them(
    how: dict[str, Any], options: ExportOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    plan(replace(options, backend="xnnpack", **how))
    for backend in set(lowering()) - {"xnnpack"}:
        with pytest.raises(
            InputError, match=rf"--backend {backend} cannot run .*; give --quantize fp32 or --backend xnnpack"
        ):
            plan(replace(options, backend=backend, **how))


def test_a_backend_is_imported_when_it_is_chosen() -> None:
    code = "import sys, export.lowering.backends; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "export.lowering.backends" in done.stdout.split()
    assert not {"executorch.backends", "executorch.exir", "coremltools", "openvino"} & set(done.stdout.split())


def test_help_lists_the_backends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export_main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(lowering()) in text
    assert ", ".join(REFUSED) in text


def test_partitioners_output_is_suppressed_but_not_their_errors(capfd: pytest.CaptureFixture[str]) -> None:
    with quietly():
        print("printed")
        print("printed", file=sys.stderr)
        logging.getLogger("some").warning("logged")
        os.write(2, b"native")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(KeyError), quietly():
        raise KeyError
    print("heard")
    logging.getLogger("some").warning("logged")
    assert capfd.readouterr().out == "heard\n"
    assert logging.root.manager.disable == logging.NOTSET
