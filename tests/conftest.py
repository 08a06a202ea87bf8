"""Shared fixtures: test models that are built and exported once per run. Exports are kept in build/models and reused
while unchanged.
"""

import fcntl
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import settings
from playwright.sync_api import Browser

from export.checkpoints.layouts import BUILT_IN
from export.llama import export_llama
from export.lowering.assemble import Assembled, assemble
from export.lowering.export_cache import ExportCache, default_folder
from export.lowering.lower import lower
from export.lowering.trace import GraphOptions
from export.lowering.write import write_program
from export.planning.plan import ExportOptions, Plan
from export.planning.sharding import Sharding
from export.weights.scheme import SCHEMES, Scheme
from export.weights.source import WeightSource
from model.config import ModelConfig
from model.model import Llama
from runtime.engine.program import Program
from tests.support.browser import chromium
from tests.support.checkpoints import write_llama2c

torch.set_num_threads(1)  # test processes share the cores, and a second thread does not speed up such small matrices

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path(os.environ.get("LLAMA_RUNNER_BUILD", ROOT / "build" / "host"))
MODELS = Path(__file__).parent.parent / "build" / "models"
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
SMOLLM2 = ROOT / "build" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
"""A real instruct model, which `make test` fetches."""

os.environ["XDG_CACHE_HOME"] = str(ROOT / "build" / "cache")  # also read by commands that tests start

TOY = ModelConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=2048, context=48, tied=True
)
"""A model that is lowered in seconds. Its vocabulary is that of the built-in tokenizer."""

DEEP = replace(TOY, n_layers=5, n_heads=4, n_kv_heads=2)
"""A model with grouped queries and enough blocks for shards of one, two and three blocks."""


gc.disable()  # during the imports, whose objects stay alive


def pytest_collection_finish() -> None:
    """Excludes the imported objects from later garbage collections, which take a fifth of an export's time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Returns the folder of real weights, tokenizers and text; skips the test where it does not exist, as in a user's
    clone.
    """
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data, which is not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> ExportOptions:
    """Returns the export options of a real model with 260,000 parameters."""
    folder = shared / "stories260K"
    return ExportOptions(checkpoint=folder / "stories260K.bin", tokenizer=folder / "tok512.model", max_seq_len=512)


@pytest.fixture(scope="session")
def stories_pte(stories260k: ExportOptions) -> Path:
    """Returns stories260K, exported for XNNPACK with the default prefill chunk."""
    return exported(replace(stories260k, output=MODELS / "stories260K.pte"))


@pytest.fixture(scope="session")
def runner() -> Path:
    """Returns the path of the compiled C++ runner."""
    path = BUILD / "llama_runner"
    if not path.exists():
        pytest.fail(f"{path} does not exist; build it first (make runner)")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Runs Chromium."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def tiny_pte() -> Path:
    """Returns the built-in model, exported as in the README."""
    return exported(ExportOptions(max_seq_len=512, output=MODELS / "tiny.pte"))


@pytest.fixture(scope="session")
def chat_pte() -> Path:
    """Returns the built-in model with Llama 2's template."""
    return exported(ExportOptions(max_seq_len=512, chat_template="llama2", output=MODELS / "chat.pte"))


@pytest.fixture(scope="session")
def toy_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint of TOY with random weights, in llama2.c's layout."""
    return write_llama2c(toy_model(), tmp_path_factory.mktemp("toy") / "toy.bin", version=1)


@pytest.fixture(scope="session")
def toy_options(toy_bin: Path) -> ExportOptions:
    """Returns the export options of TOY, with a prefill chunk that is no divisor of the context."""
    return ExportOptions(checkpoint=toy_bin, tokenizer=BUILT_IN / "tokenizer.model", prefill_chunk=7)


@pytest.fixture(scope="session")
def toy_pte(toy_options: ExportOptions) -> Path:
    """Returns TOY's exported file."""
    return exported(replace(toy_options, output=MODELS / "toy.pte"))


@pytest.fixture(scope="session")
def toy_program(toy_pte: Path) -> Program:
    """Returns TOY's opened program, which all tests share because it is immutable."""
    return Program(toy_pte)


@pytest.fixture(scope="session")
def three_toys(toy_options: ExportOptions) -> Path:
    """Returns TOY exported with --batch-size 3."""
    return exported(replace(toy_options, batch_size=3, output=MODELS / "toys.pte"))


def exported(options: ExportOptions) -> Path:
    """Exports a model, once even if several test processes need it at the same time."""
    assert options.output, "a shared model has a name"
    with alone(options.output.stem):
        return export_llama(options)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Admits one process at a time per name, so that the others find the file that the first one made."""
    MODELS.mkdir(parents=True, exist_ok=True)
    with (MODELS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def toy_model() -> Llama:
    """Returns TOY with random weights that are large enough for logits to differ by more than rounding."""
    return random_model(TOY)


def random_model(config: ModelConfig, seed: int = 0) -> Llama:
    """Returns a model with random weights whose logits are of order 1."""
    torch.manual_seed(seed)
    model = Llama(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, 0.3)
    return model


def random_options(config: ModelConfig, folder: Path) -> ExportOptions:
    """Writes a random model to the folder and returns its export options: no tokenizer, prefill chunks of 7 tokens."""
    checkpoint = write_llama2c(random_model(config), folder / "random.bin", version=1)
    return ExportOptions(checkpoint=checkpoint, tokenizer=Path("none"), prefill_chunk=7)


def planned(model: Llama, graph: GraphOptions, scheme: Scheme = SCHEMES["fp32"]) -> Plan:
    """Returns the export plan of a model in memory, without a tokenizer."""
    return Plan(
        source=WeightSource(model.config, model.state_dict(), scheme),
        graph=graph,
        sharding=Sharding(),
        tokenizer=None,
        provenance={
            "options": asdict(graph) | {"quantize": "", "scheme": scheme.to_json()},
            "checkpoint": {"xxh3_128": _digest(model)},
            "bos_id": None,
            "stop_ids": [],
        },
        output=Path("model.pte"),
        summary="",
        warnings=(),
    )


def _digest(model: Llama) -> str:
    digest = xxhash.xxh3_128()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy())
    return digest.hexdigest()


def assembled(plan: Plan, backend: str = "portable", number: int = 0) -> Assembled:
    """Returns the program of a plan, or of one of its shards or slices."""
    source = plan.source
    key = xxhash.xxh3_64_hexdigest(repr((source.config, plan.shards, backend, source.scheme)).encode())
    with alone(f"{key}.codes"):
        codes = lower(source.config, plan.shards, backend, source.scheme, ExportCache(default_folder()))
    return assemble(source, plan.shards[number], codes, backend, plan.identity)


def write_pte(plan: Plan, path: Path, backend: str = "portable", number: int = 0) -> Path:
    """Writes the file of a plan, or of one of its shards or slices, with the stages of the export pipeline."""
    program = assembled(plan, backend, number)
    write_program(program, plan.metadata(program, plan.shards[number]), path)
    return path


def _missing(reporter: pytest.TerminalReporter) -> list[str]:
    """Returns the reasons of skipped tests that fail CI: all, except missing shared data where that folder does not
    exist.
    """
    if not os.environ.get("CI"):
        return []
    reasons = [report.longrepr[2] for report in reporter.stats.get("skipped", ())]
    return [reason for reason in reasons if SHARED.is_dir() or "needs ../shared/data" not in reason]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints an error for each skipped test that fails CI."""
    for reason in _missing(terminalreporter):
        terminalreporter.write_line(f"error: a test was skipped, and CI runs all: {reason}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails CI if a test was skipped, as every requirement is installed there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and _missing(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
