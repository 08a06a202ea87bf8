"""Tests the export command and its pipeline, from a checkpoint to a file that runs."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from export import llama as command
from export.checkpoints.layouts import BUILT_IN, open_checkpoint
from export.llama import ExportOptions, Progress, VerificationError, export_llama
from export.lowering.assemble import Assembled
from export.planning import plan
from export.weights.source import WeightSource
from model.errors import InputError
from runtime import generate
from runtime.cli.command import run_command
from runtime.engine.program import Program, read_metadata
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions
from runtime.text.sampler import Rng
from tests.conftest import MODELS, TOY
from tests.model.test_model import VARIANTS, hugging_face_llama

STAGES = ("open", "lower", "assemble", "write", "verify")


class Recorder(Progress):
    """Records the stages that ran, how much of them was done, and the messages."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.done: dict[str, list[tuple[int, int]]] = {}
        self.notes: list[str] = []

    def advance(self, done: int, total: int) -> None:
        self.done.setdefault(self.stages[-1], []).append((done, total))

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        self.stages.append(name)
        yield []

    def note(self, line: str) -> None:
        self.notes.append(line)


def greedy(pte: Path, prompt: list[int], count: int) -> list[int]:
    program = Program(pte)
    steps = generate.generate(Session(program), prompt, GenerationOptions(max_new_tokens=count), Rng(0))
    return [step.token for step in steps]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hugging_face_llama_gives_transformers_own_tokens_and_logits(variant: str, tmp_path: Path) -> None:
    theirs = hugging_face_llama(variant, tmp_path / "model")
    name = "-".join(word.strip(",") for word in variant.split())
    options = ExportOptions(
        checkpoint=tmp_path / "model", tokenizer=Path("none"), prefill_chunk=8, output=MODELS / f"{name}.pte"
    )
    pte = export_llama(options)
    prompt = [1, 17, 42, 99, 5, 6, 7, 8, 150, 3, 77]
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    ids = expected.sequences[0, len(prompt) :].tolist()
    assert greedy(pte, prompt, 64) == ids
    outside = ("aten::embedding.out", "llama_pte::attention.out")
    assert read_metadata(pte).requirements.operators == outside, "all else is XNNPACK's"
    session = Session(Program(pte))
    rows = [session.prefill(prompt), *(session.decode(token) for token in ids[:-1])]
    torch.testing.assert_close(torch.stack(rows), torch.cat(expected.logits), atol=1e-4, rtol=0)


GREEDY_200_FAST = {
    ("stories260K_v1.bin", "xnnpack", "fused", 8),
    ("stories260K_v1.bin", "xnnpack", "aten", 1),
    ("stories260K.bin", "portable", "aten", 8),
}
GREEDY_200 = itertools.product(
    ("stories260K.bin", "stories260K_v1.bin"), ("xnnpack", "portable"), ("fused", "aten"), (1, 8, 32)
)


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id="-".join(map(str, way)), marks=() if way in GREEDY_200_FAST else pytest.mark.slow)
        for way in GREEDY_200
    ],
)
def test_stories260k_prints_greedy_200(
    stories260k: ExportOptions,
    shared: Path,
    capfd: pytest.CaptureFixture[str],
    way: tuple[str, str, str, int],
) -> None:
    checkpoint, backend, attention, chunk = way
    output = MODELS / f"{checkpoint}-{backend}-{attention}-{chunk}.pte"
    options = replace(stories260k, checkpoint=stories260k.checkpoint.with_name(checkpoint), backend=backend)
    pte = export_llama(replace(options, attention=attention, prefill_chunk=chunk, output=output))
    capfd.readouterr()
    generate.main([str(pte), "--max-new-tokens", "200"])
    assert capfd.readouterr().out == (shared / "stories260K" / "greedy-200.txt").read_text()


def test_the_built_in_model_exports_and_tells_a_story(tiny_pte: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate.main([str(tiny_pte), "--prompt", "Once upon a time", "--max-new-tokens", "60"]) == 0
    words = capfd.readouterr().out.split()
    assert len(words) > 30
    assert len(set(words)) > 15


def test_one_command_goes_from_checkpoint_to_text(tiny_pte: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run must not export again."""
    before = tiny_pte.stat().st_mtime_ns
    assert command.main(["--max-seq-len", "512", "--output", str(tiny_pte), "--run", "Once upon a time"]) == 0
    assert tiny_pte.stat().st_mtime_ns == before
    path, text = capsys.readouterr().out.split("\n", 1)
    assert path == str(tiny_pte)
    generate.main([str(tiny_pte), "--prompt", "Once upon a time"])
    assert text == capsys.readouterr().out


def test_a_second_identical_export_is_skipped_and_a_different_one_is_not(
    toy_options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "toy.pte"
    first = replace(toy_options, output=output, backend="portable")
    export_llama(first)
    before = output.stat().st_mtime_ns
    content = output.read_bytes()

    again = Recorder()
    export_llama(first, again)
    assert again.stages == ["open"]
    assert again.notes == [f"{output} is up to date; --force exports it again"]
    assert output.stat().st_mtime_ns == before

    for other in (replace(first, force=True), replace(first, prefill_chunk=5)):
        redone = Recorder()
        export_llama(other, redone)
        assert redone.stages == list(STAGES)
        assert redone.done["write"] == sorted(redone.done["write"])
        assert redone.done["write"][-1] == (output.stat().st_size - 32,) * 2, "all but the trailer"
        assert output.stat().st_mtime_ns != before
    assert output.read_bytes() != content

    moved = shutil.copy(toy_options.checkpoint, tmp_path / "moved.bin")
    same_content = Recorder()
    export_llama(replace(first, checkpoint=Path(moved), prefill_chunk=5), same_content)
    assert same_content.stages == ["open"]
    export_llama(replace(first, force=True))
    assert output.read_bytes() == content, "equal exports are equal byte for byte"

    monkeypatch.setattr(plan, "versions", lambda: {"torch": "9.9.9"})
    other_versions = Recorder()
    export_llama(first, other_versions)
    assert other_versions.stages == list(STAGES)


def test_a_wrong_weight_fails_the_export_and_keeps_the_earlier_file(
    toy_options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "toy.pte"
    output.write_bytes(b"earlier")
    real = command.assemble

    def assemble_another(source: WeightSource, *others: Any) -> Assembled:
        weights = dict(open_checkpoint(toy_options.checkpoint).weights)
        weights["layers.1.attention.wo.weight"] = weights["layers.1.attention.wo.weight"] * 1.01
        return real(WeightSource(source.config, weights, source.scheme), *others)

    monkeypatch.setattr(command, "assemble", assemble_another)
    with pytest.raises(VerificationError, match=r"differs from the checkpoint: error .* was not written"):
        export_llama(replace(toy_options, output=output, backend="portable"))
    flags = ["--checkpoint", str(toy_options.checkpoint), "--tokenizer", "none", "--backend", "portable"]
    assert command.main([*flags, "--output", str(output)]) == 1
    assert "was not written" in capsys.readouterr().err
    assert output.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [output]


def test_a_context_beyond_the_trained_one_gives_a_warning(toy_options: ExportOptions, tmp_path: Path) -> None:
    progress = Recorder()
    options = replace(toy_options, max_seq_len=60, backend="portable", output=tmp_path / "long.pte")
    export_llama(options, progress)
    assert progress.notes == ["warning: --max-seq-len 60 is more than the 48 positions the model was trained for"]
    assert read_metadata(tmp_path / "long.pte").max_seq_len == 60


def exits_with(arguments: list[str], main: Callable[[list[str]], int]) -> int | str | None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main(arguments))
    signal.signal(signal.SIGTERM, handler)
    return caught.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-seq-len", "0"], "--max-seq-len 0 is invalid; give 1 or more"),
        (["--max-seq-len", "-3"], "--max-seq-len -3"),
        (["--prefill-chunk", "0"], "--prefill-chunk 0"),
        (["--max-seq-len", "16", "--prefill-chunk", "17"], "--prefill-chunk 17 is larger than --max-seq-len 16"),
        (["--backend", "abacus"], "--backend abacus is unknown; choose from xnnpack, portable"),
        (["--quantize", "fp12"], "--quantize fp12 is unknown; choose from fp32"),
        (["--kv-dtype", "fp8"], "--kv-dtype fp8 is unknown; choose from fp32, fp16, int8"),
        (["--kv-dtype", "fp16", "--attention", "aten"], "--kv-dtype fp16 is unsupported with --attention aten"),
        (["--kv-dtype", "int8", "--no-kv-cache"], "--kv-dtype int8 is unsupported with --attention aten"),
        (
            ["--attention", "fused", "--no-kv-cache"],
            "--attention fused needs a KV cache; leave",
        ),
        (
            ["--attention", "fused", "--backend", "vulkan"],
            "--attention fused is unsupported by --backend vulkan; choose from",
        ),
        (["--original-context"], "--original-context needs a model with an extended context"),
        (["--checkpoint", "absent"], "checkpoint absent does not exist"),
        (["--checkpoint", "cut.bin", "--tokenizer", "none"], "cut.bin is truncated"),
        (["--checkpoint", "whole.bin"], "whole.bin has no tokenizer; give --tokenizer FILE"),
        (["--checkpoint", "whole.bin", "--tokenizer", "absent"], "tokenizer absent is not a file"),
        (["--checkpoint", "whole.bin", "--tokenizer", "whole.bin"], "tokenizer whole.bin: its content is neither"),
        (
            ["--output", "/proc/absent/a.pte"],
            "--output /proc/absent/a.pte cannot be written (No such file or directory)",
        ),
        (["--output", "folder"], "--output folder is a folder"),
        (["--max-seq-len", "1000000000000"], "--max-seq-len 1000000000000 needs KV caches of"),
        (
            ["--checkpoint", "whole.bin", "--tokenizer", "none", "--output", "./whole.bin"],
            "is one of the checkpoint's files",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2_and_leaves_nothing(
    toy_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole.bin").write_bytes(toy_bin.read_bytes())
    (tmp_path / "cut.bin").write_bytes(toy_bin.read_bytes()[:-1000])
    (tmp_path / "folder").mkdir()
    assert exits_with(arguments, command.main) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.bin", "folder", "whole.bin"]
    assert not list((tmp_path / "folder").iterdir())


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    from tests.conftest import random_model
    from tests.support.checkpoints import write_llama2c

    small = write_llama2c(random_model(replace(TOY, vocab_size=100)), tmp_path / "small.bin", 1)
    with pytest.raises(InputError, match=r"has \d+ ids, but the model has 100"):
        export_llama(ExportOptions(checkpoint=small, tokenizer=BUILT_IN / "tokenizer.model"))


def test_an_export_is_named_after_its_checkpoint(toy_bin: Path, tmp_path: Path) -> None:
    (tmp_path / "Llama-3.2-1B").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "Llama-3.2-1B")
    (tmp_path / "a.b.bin").touch()
    names = {path: plan._name(tmp_path / path) for path in ("Llama-3.2-1B", "latest", "a.b.bin")}
    assert names == {"Llama-3.2-1B": "Llama-3.2-1B", "latest": "latest", "a.b.bin": "a.b"}


def test_other_stop_ids_are_another_export(tmp_path: Path) -> None:
    hugging_face_llama("mha, tied", tmp_path / "model")
    options = ExportOptions(tmp_path / "model", Path("none"), tmp_path / "a.pte", 16, 1, "portable")
    export_llama(options)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    export_llama(options)
    assert read_metadata(tmp_path / "a.pte").stop_ids == (3, 4)


def test_help_lists_every_flag_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits_with(["--help"], command.main) == 0
    text = capsys.readouterr().out
    for flag in (
        "--checkpoint",
        "--tokenizer",
        "--output",
        "--max-seq-len",
        "--prefill-chunk",
        "--backend",
        "--quantize",
    ):
        assert flag in text
    assert "python -m export.llama --max-seq-len 512" in text


KILLED = """
    import os, signal, sys, time
    from contextlib import contextmanager
    from pathlib import Path
    from export.llama import ExportOptions, Progress, export_llama

    class KillAt(Progress):
        def __init__(self, stage): self.at = stage
        @contextmanager
        def stage(self, name):
            if name == self.at: os.kill(os.getpid(), signal.SIGKILL)
            yield []
            if name == "verify" and self.at == "end": os.kill(os.getpid(), signal.SIGKILL)

    options = ExportOptions(checkpoint=Path(sys.argv[1]), tokenizer=Path("none"), output=Path(sys.argv[2]),
                            backend=sys.argv[3], prefill_chunk=1, force=True)
    for plan in sys.argv[4:]:
        child = os.fork()
        if child == 0:
            export_llama(options, KillAt(plan))
            os._exit(0)
        if plan[0].isdigit():
            time.sleep(float(plan))
            os.kill(child, signal.SIGKILL)
        print(plan, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def killed(toy_bin: Path, output: Path, backend: str, plans: list[str]) -> list[str]:
    """Runs one export per plan, each killed at a stage's start or after some seconds, and returns how each ended."""
    call = [sys.executable, "-c", textwrap.dedent(KILLED), str(toy_bin), str(output), backend, *plans]
    root = Path(__file__).parents[2]
    done = subprocess.run(call, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.slow
def test_an_export_killed_at_any_stage_leaves_the_earlier_file_whole(toy_bin: Path, tmp_path: Path) -> None:
    output = tmp_path / "toy.pte"
    output.write_bytes(b"earlier")
    plans = [*STAGES, "end"]
    assert killed(toy_bin, output, "portable", plans) == [f"{plan} -9" for plan in plans]
    assert output.read_bytes() == b"earlier"
    assert killed(toy_bin, output, "portable", ["never"]) == ["never 0"]
    assert os.listdir(tmp_path) == ["toy.pte"], "what the killed ones left was removed"
    assert len(greedy(output, [1], 5)) == 5


@pytest.mark.slow
def test_an_export_killed_at_random_times_leaves_a_whole_file(
    toy_options: ExportOptions, toy_bin: Path, tmp_path: Path
) -> None:
    output = tmp_path / "toy.pte"
    short = replace(toy_options, tokenizer=Path("none"), backend="portable", prefill_chunk=1, max_seq_len=9)
    earlier = export_llama(replace(short, output=output)).read_bytes()
    started = time.monotonic()
    killed(toy_bin, tmp_path / "timed.pte", "portable", ["never"])
    once = time.monotonic() - started
    killed(toy_bin, tmp_path / "timed.pte", "portable", ["never", "never"])
    seconds = time.monotonic() - started - 2 * once  # time of one export, without the process's start
    (tmp_path / "timed.pte").unlink()
    generator, kills, moments = random.Random(0), 0, 0
    while kills < 20:  # an export that ended before it was killed does not count
        (end,) = killed(toy_bin, output, "portable", [f"{generator.uniform(0, seconds):.3f}"])
        kills += end.endswith(" -9")
        moments += 1
        if read_metadata(output).max_seq_len != 9:
            assert len(greedy(output, [1], 3)) == 3
            output.write_bytes(earlier)
        assert output.read_bytes() == earlier
        assert moments < 200
    assert killed(toy_bin, output, "portable", ["never"]) == ["never 0"]
    assert os.listdir(tmp_path) == ["toy.pte"]
