"""Tests shards: cut at export, found in a folder, checked against each other, and run as the whole model."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.llama import export_llama
from export.planning.plan import ExportOptions
from export.planning.sharding import Sharding
from model.errors import InputError
from runtime.engine.executorch import Shard
from runtime.engine.program import Program, read_metadata
from runtime.engine.session import Session
from runtime.pte.metadata import MethodSpec
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.conftest import DEEP, MODELS, exported, random_options


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    """Returns the export options of DEEP."""
    return random_options(DEEP, tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def whole(deep: ExportOptions) -> Path:
    """Returns DEEP in one file."""
    return exported(replace(deep, output=MODELS / "deep.pte"))


@pytest.fixture(scope="module")
def shards(deep: ExportOptions) -> Path:
    """Returns DEEP in three shards."""
    return exported(replace(deep, sharding=Sharding(3), output=MODELS / "deep.shards"))


def ids(path: Path, prompt: list[int], temperature: float = 0.0) -> list[int]:
    options = GenerationOptions(SamplingOptions(temperature), max_new_tokens=30)
    return [step.token for step in generate(Session(Program(path)), prompt, options, Rng(7))]


@pytest.mark.parametrize("count", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 5))])
def test_any_number_of_shards_gives_the_whole_models_tokens(
    count: int, deep: ExportOptions, whole: Path, runner: Path
) -> None:
    folder = exported(
        replace(deep, sharding=Sharding(count), output=MODELS / ("deep.shards" if count == 3 else f"deep{count}"))
    )
    assert [file.name for file in sorted(folder.iterdir())] == [f"{i}-of-{count}.pte" for i in range(1, count + 1)]
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    expected = ids(whole, prompt)
    assert ids(folder, prompt) == expected
    assert ids(folder, prompt, temperature=0.8) == ids(whole, prompt, temperature=0.8)
    command = [runner, folder, "--prompt-ids", ",".join(map(str, prompt)), "--max-new-tokens", "30", "--format", "json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert found["token_ids"] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"quantize": "8da8w", "kv_dtype": "int8"},
        {"attention": "aten"},
        {"kv_cache": False},
        {"backend": "portable"},
        {"hidden_states": True},
        {"batch_size": 2},
    ],
)
def test_every_kind_of_graph_can_be_cut(changes: dict[str, object], deep: ExportOptions, tmp_path: Path) -> None:
    """The export verifies each shard against the eager model; this test compares the logits with the whole model's."""
    options = replace(deep, prefill_chunk=3, max_seq_len=16, **changes)  # type: ignore[arg-type]
    one = Program(export_llama(replace(options, output=tmp_path / "one.pte")))
    two = Program(export_llama(replace(options, sharding=Sharding(2), output=tmp_path / "two")))
    assert one.metadata.methods == tuple(replace_order(spec, one) for spec in two.metadata.methods)
    method = one.metadata.methods[0]
    inputs = {spec.name: spec.zeros(method.max_length) for spec in method.inputs}
    expected = one.step(method, inputs)
    for name, found in two.step(method, inputs).items():
        torch.testing.assert_close(found, expected[name], msg=name)


def replace_order(spec: MethodSpec, program: Program) -> MethodSpec:
    """Returns the method with its inputs and outputs in the order of another program's."""
    (other,) = (each for each in program.metadata.methods if each.name == spec.name)
    inputs, outputs = ({each.name: each for each in found} for found in (spec.inputs, spec.outputs))
    return replace(
        spec,
        inputs=tuple(inputs.pop(each.name) for each in other.inputs) + tuple(inputs.values()),
        outputs=tuple(outputs.pop(each.name) for each in other.outputs) + tuple(outputs.values()),
    )


def test_a_session_saved_with_shards_continues_in_the_whole_model(whole: Path, shards: Path, tmp_path: Path) -> None:
    session = Session(Program(shards))
    session.prefill([5, 6, 7])
    session.save(tmp_path / "session")
    other = Session(Program(whole))
    other.load(tmp_path / "session")
    torch.testing.assert_close(other.decode(8), session.decode(8))


def test_shards_have_the_metadata_of_the_whole(whole: Path, shards: Path) -> None:
    one, three = read_metadata(whole), read_metadata(shards)
    assert (three.identity, three.matrix_bytes, three.span) == (one.identity, one.matrix_bytes, range(5))
    with pytest.raises(InputError, match=r"the shard with blocks 0 to \d is missing beside .*2-of-3.pte"):
        Program(shards / "2-of-3.pte")


def test_files_that_do_not_form_one_model_are_refused_by_name(
    deep: ExportOptions, shards: Path, runner: Path, tmp_path: Path
) -> None:
    other = export_llama(replace(deep, prefill_chunk=5, sharding=Sharding(3), output=tmp_path / "other"))

    def refused(folder: Path, *words: str) -> None:
        with pytest.raises(InputError) as error:
            Program(folder)
        done = subprocess.run([runner, folder, "--prompt-ids", "1"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        for word in words:
            assert word in str(error.value)
            assert word in done.stderr

    def folder(name: str) -> Path:
        return Path(shutil.copytree(shards, tmp_path / name))

    for number in (1, 2, 3):
        missing = folder(f"missing{number}")
        (missing / f"{number}-of-3.pte").unlink()
        refused(missing, "is missing beside", "the shard with blocks")
    foreign = folder("foreign")
    shutil.copy(other / "2-of-3.pte", foreign)
    refused(foreign, "foreign/2-of-3.pte is from another export")
    twice = folder("twice")
    shutil.copy(twice / "2-of-3.pte", twice / "copy.pte")
    refused(twice, "which another shard also has")
    damaged = folder("damaged")
    with (damaged / "3-of-3.pte").open("r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    refused(damaged, "3-of-3.pte is damaged")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no .pte files")


def test_shards_beyond_the_budget_are_loaded_for_each_step(
    whole: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.engine.sequential.memory", lambda: 5_000_000)
    one, metadata = Session(Program(whole)), read_metadata(shards)
    sizes = 5_000_000 + metadata.activation_bytes + metadata.cache_bytes
    program = Program(shards, memory_budget=sizes + metadata.matrix_bytes)
    assert 0 < program.bytes_loaded < metadata.matrix_bytes
    streamed = Session(program)
    for tokens in ([3, 1, 4, 1, 5], [9], [2], [6, 5, 3, 5, 8, 9, 7, 9, 3], [2]):
        assert torch.equal(streamed.prefill(tokens), one.prefill(tokens))
    assert Program(shards, memory_budget=sizes + 2 * metadata.matrix_bytes).bytes_loaded == 0
    with pytest.raises(InputError, match="--memory-budget leaves 0 MB for weights"):
        Program(shards, memory_budget=sizes)


def budget(runner: Path, folder: Path, shards: int = 1) -> str:
    """Returns the value of --memory-budget for so many of the largest shard. 2 MB are added, as the process's own
    memory varies.
    """
    refused = subprocess.run([runner, folder, "--prompt-ids", "1", "--memory-budget", "1MB"], capture_output=True)
    lacking = re.search(rb"needs (\d+) MB; give (\d+) MB more", refused.stderr)
    assert refused.returncode == 2
    assert lacking, refused.stderr
    return f"{int(lacking[1]) * (shards - 1) + int(lacking[2]) + 2}MB"


def test_the_runner_maps_packed_files(tiny_pte: Path, runner: Path, tmp_path: Path) -> None:
    """Two or three of five shards fit the budget; every run after the first must use the packed files."""
    folder = export_llama(ExportOptions(max_seq_len=512, sharding=Sharding(5), output=tmp_path / "tiny"))
    flags = ["--prompt", "Once upon a time", "--max-new-tokens", "20", "--format", "json"]
    expected = subprocess.run([runner, tiny_pte, *flags], capture_output=True, check=True)
    flags += ["--memory-budget", budget(runner, folder, shards=2)]
    packed = list[dict[str, int]]()
    for _ in range(2):
        found = subprocess.run([runner, folder, *flags], capture_output=True, check=True)
        assert json.loads(found.stdout)["token_ids"] == json.loads(expected.stdout)["token_ids"]
        packed.append({path.name: path.stat().st_mtime_ns for path in folder.glob("*.packed")})
    assert 1 <= len(packed[0]) < 5
    assert packed[0] == packed[1], "they were made once"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("model", ["stories260K", "built-in"])
def test_real_models_streamed_give_the_whole_models_tokens(
    model: str, count: int, stories260k: ExportOptions, runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = stories260k if model == "stories260K" else ExportOptions(max_seq_len=512)
    one = exported(replace(options, output=MODELS / f"streamed-{model}.pte"))
    folder = export_llama(replace(options, sharding=Sharding(count), output=tmp_path / "shards"))
    prompt = [1, 403, 407, 261]
    expected = ids(one, prompt)
    monkeypatch.setattr("runtime.engine.sequential.memory", lambda: 0)
    largest = max(Shard(path).metadata.matrix_bytes for path in folder.glob("*.pte"))
    metadata = read_metadata(folder)
    room = metadata.activation_bytes + metadata.cache_bytes + int(1.05 * largest)
    program = Program(folder, memory_budget=room)
    assert program.bytes_loaded > 0
    limit = GenerationOptions(max_new_tokens=30)
    assert [step.token for step in generate(Session(program), prompt, limit, Rng(7))] == expected
    flags = ["--prompt-ids", ",".join(map(str, prompt)), "--max-new-tokens", "30", "--format", "json"]
    command = [runner, folder, *flags, "--memory-budget", budget(runner, folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert found["token_ids"] == expected


def test_another_sharding_replaces_the_first(deep: ExportOptions, shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "shards"))
    options = replace(deep, output=folder)
    (folder / "2-of-3.pte.0123456789abcdef.packed").touch()
    export_llama(replace(options, sharding=Sharding(2)))
    assert sorted(file.name for file in folder.iterdir()) == ["1-of-2.pte", "2-of-2.pte"]
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    export_llama(replace(options, sharding=Sharding(2)))
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written, "nothing was to be done"
