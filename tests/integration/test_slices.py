"""Tests tensor-parallel slices: divided at export, found in a folder, checked against each other, and run as the whole
model.
"""

import itertools
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from export.inspect import main as inspect
from export.llama import export_llama
from export.planning.plan import ExportOptions
from export.planning.sharding import Sharding
from export.quality.eager import reference
from export.weights.formats.integer import BYTE
from export.weights.scheme import SCHEMES, Scheme, adjusted
from model.config import ModelConfig
from model.errors import InputError
from runtime.engine.program import Program, read_metadata
from runtime.engine.session import Session, Steps
from runtime.engine.tensor_parallel import Alone
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.conftest import MODELS, exported, planned, random_model, random_options, write_pte
from tests.support.kinds import EagerSteps, Kind
from tests.support.slices import GRAPH, GROUPED, PADDED, UNUSUAL, EagerSlices, Meeting, in_slices

QUANTISED = [
    SCHEMES["8da8w"],
    adjusted(SCHEMES["8da4w"], None, 4, 8, "nearest"),
    replace(SCHEMES["8da4w"], others={"layers.1": BYTE}, kv_dtype="float16"),
    replace(SCHEMES["8da8w"], kv_dtype="int8"),
]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def ids(program: Steps, temperature: float = 0.0) -> list[int]:
    options = GenerationOptions(SamplingOptions(temperature), max_new_tokens=25)
    return [step.token for step in generate(Session(program), PROMPT, options, Rng(7))]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    """Returns the export options of GROUPED."""
    return random_options(GROUPED, tmp_path_factory.mktemp("grouped"))


@pytest.fixture(scope="module")
def whole(grouped: ExportOptions) -> Path:
    """Returns GROUPED in one file."""
    return exported(replace(grouped, output=MODELS / "small-whole.pte"))


@pytest.fixture(scope="module")
def slices(grouped: ExportOptions) -> Path:
    """Returns GROUPED in two slices."""
    return exported(replace(grouped, sharding=Sharding(slices=2), output=MODELS / "small-2.slices"))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", UNUSUAL)
def test_slices_of_every_kind_of_model_give_its_tokens(name: str, count: int) -> None:
    one, many = EagerSteps(Kind(UNUSUAL[name], GRAPH)), EagerSlices(in_slices(UNUSUAL[name], count))
    torch.testing.assert_close(Session(many).extend(PROMPT, 3), Session(one).extend(PROMPT, 3), atol=1e-4, rtol=0)
    assert ids(many) == ids(one)
    assert ids(many, 0.8) == ids(one, 0.8)


@pytest.mark.parametrize(
    ("config", "count", "scheme"),
    [
        *itertools.product([GROUPED], [2], QUANTISED),
        *itertools.product([replace(PADDED, head_dim=32, hidden_dim=128)], [4], QUANTISED),
        (PADDED, 4, SCHEMES["8da8w"]),
    ],
)
def test_quantised_slices_are_near_the_whole(config: ModelConfig, count: int, scheme: Scheme) -> None:
    """Activations are rounded per slice, as the reference does for slices, so results differ from the whole model's."""
    plan = in_slices(config, count, scheme)
    found = Session(EagerSlices(plan)).extend(PROMPT, 3)
    as_slices, as_whole = (
        reference(source.streamed(), [PROMPT], [3], 40)[0]
        for source in (plan.source, planned(random_model(config), GRAPH, scheme).source)
    )
    near, far = (_divergence(found, expected) for expected in (as_slices, as_whole))
    assert near < 1e-3
    assert far < 2e-2


def _divergence(found: Tensor, expected: Tensor) -> float:
    logs = [logits.log_softmax(-1) for logits in (found, expected)]
    return float(F.kl_div(*logs, reduction="none", log_target=True).sum(-1).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("backend", ["xnnpack", "portable"])
def test_slices_of_every_kind_can_be_exported(name: str, backend: str, tmp_path: Path) -> None:
    plan = in_slices(UNUSUAL[name], 2)
    for number in range(2):
        write_pte(plan, tmp_path / f"{number}.pte", backend, number)
    assert ids(Program(tmp_path)) == ids(EagerSteps(Kind(UNUSUAL[name], GRAPH)))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_exported_slices_give_the_whole_models_tokens(
    count: int, grouped: ExportOptions, slices: Path, whole: Path, tmp_path: Path
) -> None:
    options = replace(grouped, sharding=Sharding(slices=count), output=tmp_path / "slices")
    folder = slices if count == 2 else export_llama(options)
    assert [file.name for file in sorted(folder.iterdir())] == [f"{i}-of-{count}.pte" for i in range(1, count + 1)]
    assert ids(Program(folder)) == ids(Program(whole))
    assert ids(Program(folder), 0.8) == ids(Program(whole), 0.8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "count"),
    [
        (replace(PADDED, n_layers=1), 4),
        (PADDED, 5),
        (replace(PADDED, n_heads=3, head_dim=16), 2),
        (replace(PADDED, n_layers=1, n_heads=3, n_kv_heads=1, head_dim=16), 2),
    ],
)
def test_slices_that_do_not_divide_a_model_give_its_tokens(
    config: ModelConfig, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = replace(random_options(config, tmp_path), output=tmp_path / "one.pte")
    folder = export_llama(replace(one, sharding=Sharding(slices=count), output=tmp_path / "slices"))
    assert ids(Program(folder)) == ids(Program(export_llama(one)))
    assert inspect([str(folder)]) == 0
    assert f"xnnpack, in {count} slices" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_slices_of_a_real_model_give_its_tokens(
    count: int, stories260k: ExportOptions, stories_pte: Path, tmp_path: Path
) -> None:
    folder = export_llama(replace(stories260k, sharding=Sharding(slices=count), output=tmp_path / "stories.slices"))
    assert ids(Program(folder)) == ids(Program(stories_pte))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 5])
def test_slices_of_the_built_in_model_give_its_tokens(count: int, tiny_pte: Path, tmp_path: Path) -> None:
    folder = export_llama(
        ExportOptions(max_seq_len=512, sharding=Sharding(slices=count), output=tmp_path / "tiny.slices")
    )
    assert ids(Program(folder)) == ids(Program(tiny_pte))


@pytest.mark.parametrize(
    "changes",
    [
        {"quantize": "8da8w", "kv_dtype": "int8"},
        {"quantize": "8da4w", "embedding_bits": 4},
        {"hidden_states": True},
        {"backend": "portable", "attention": "fused"},
        {"kv_dtype": "fp16"},
        {"prefill_chunk": 1},
    ],
)
@pytest.mark.slow
def test_every_kind_of_graph_can_be_sliced(changes: dict[str, object], grouped: ExportOptions, tmp_path: Path) -> None:
    """The export verifies each slice against the eager model; this test compares the logits with the whole model's."""
    options = replace(grouped, **changes)  # type: ignore[arg-type]
    one = Session(Program(export_llama(replace(options, output=tmp_path / "one.pte"))))
    two = Session(Program(export_llama(replace(options, sharding=Sharding(slices=2), output=tmp_path / "two"))))
    expected, found = (session.prefill(PROMPT) for session in (one, two))
    limit = 0.1 if "quantize" in changes else 1e-4 if "kv_dtype" in changes else 1e-6
    assert _divergence(found, expected) < limit
    if one.hidden is not None and two.hidden is not None:
        torch.testing.assert_close(two.hidden, one.hidden, atol=1e-4, rtol=0)
    assert (one.hidden is None) == (two.hidden is None)


def test_processes_with_one_slice_each_give_the_tokens_of_the_whole(slices: Path, whole: Path) -> None:
    """Runs the slices in threads that wait for each other at each sum."""
    barrier, given = threading.Barrier(2), [torch.empty(0)] * 2
    programs = [
        Program([slices / f"{number + 1}-of-2.pte"], group=Meeting(number, given, barrier)) for number in range(2)
    ]
    found = [list[int](), list[int]()]
    for program in programs:
        assert program.metadata.cache_bytes == read_metadata(whole).cache_bytes // 2

    def run(number: int) -> None:
        found[number] = ids(programs[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [ids(Program(whole))] * 2


def test_slices_have_the_metadata_of_the_whole(slices: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = read_metadata(whole), read_metadata(slices)
    assert (two.config, two.cache_bytes) == (one.config, one.cache_bytes)
    padded = 4 * GROUPED.dim
    assert two.matrix_bytes == one.matrix_bytes + padded
    assert [spec.name for spec in two.methods] == ["forward"]
    specs = (
        {each.name: each for each in (*found.methods[0].inputs, *found.methods[0].outputs)} for found in (one, two)
    )
    assert next(specs) == next(specs)
    assert two.identity != one.identity
    assert inspect([str(slices)]) == 0
    assert "xnnpack, in 2 slices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda options: Sharding(slices=0), "--tensor-parallel 0 is invalid"),
        (lambda options: Sharding(2, slices=2), "--tensor-parallel 2 cannot be combined with --shards"),
        (lambda options: Sharding(shard_bytes=100, slices=2), "--tensor-parallel 2 cannot be combined with --shards"),
        (lambda options: export_llama(replace(options, attention="aten")), "is unsupported with --attention aten"),
        (lambda options: export_llama(replace(options, kv_cache=False)), "is unsupported with --attention aten"),
        (lambda options: export_llama(replace(options, batch_size=2)), "cannot be combined with --batch-size 2"),
    ],
)
def test_flags_that_contradict_slices_are_refused(
    make: Callable[[ExportOptions], object], problem: str, grouped: ExportOptions, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=problem):
        make(replace(grouped, sharding=Sharding(slices=2), output=tmp_path / "refused"))


def test_files_that_do_not_form_one_model_are_refused_by_name(
    grouped: ExportOptions, slices: Path, whole: Path, runner: Path, tmp_path: Path
) -> None:
    first, second = slices / "1-of-2.pte", slices / "2-of-2.pte"

    def refused(paths: Sequence[Path], problem: str, **flags: object) -> None:
        with pytest.raises(InputError, match=problem):
            Program(paths, **flags)  # type: ignore[arg-type]

    refused([first], r"slice 2 of 2 is missing beside .*1-of-2\.pte")
    refused([second], r"slice 1 of 2 is missing beside .*2-of-2\.pte")
    copy = Path(shutil.copy(second, tmp_path / "copy.pte"))
    refused([first, second, copy], r"copy\.pte is slice 2 of 2, as is another file")
    refused([first, whole], "is from another export than")
    refused([first, second], "--memory-budget is unsupported for slices, and .* one of 2;", memory_budget=1 << 40)
    refused([first], r"1-of-2\.pte is one of 2 slices, which run only together", partial=True)
    refused([whole], r"small-whole\.pte is not a slice", group=Alone())
    done = subprocess.run([runner, slices, "--prompt-ids", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "1-of-2.pte is one of 2 slices, which only the Python runtime runs; export without" in done.stderr
