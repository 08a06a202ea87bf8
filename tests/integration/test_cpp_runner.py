"""Tests the C++ runner's command: its output, errors and exit codes are those of `python -m runtime.generate`. Also
tests its size.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from export.checkpoints.layouts import BUILT_IN
from export.llama import export_llama
from export.planning.plan import ExportOptions, plan
from export.quality.eager import reference
from export.weights.scheme import Scheme
from export.weights.source import piece_names
from preproc.tokenizer import from_bytes
from runtime import bench
from runtime.engine.program import Program, read_metadata
from runtime.engine.session import Session
from runtime.generate import main
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng
from tests.conftest import BUILD, MODELS, ROOT
from tests.support.kinds import CONTEXT, KINDS, VOCABULARY, export_kind, recomputed

CMAKE = ROOT / ".venv" / "bin" / "cmake"


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False)


def test_prints_what_llama2_c_prints(runner: Path, stories_pte: Path, shared: Path) -> None:
    done = _run(runner, stories_pte, "--max-new-tokens", "200")
    assert done.stdout == (shared / "stories260K" / "greedy-200.txt").read_text()
    assert done.stderr.startswith("load ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "scheme",
    [
        {"quantize": "8da4w", "embedding_bits": 4},  # tied to the head
        {"quantize": "q4_k_m"},
        pytest.param({"quantize": "8da4w", "group_size": 64, "head_bits": 8}, marks=pytest.mark.slow),
        pytest.param({"quantize": "mixed"}, marks=pytest.mark.slow),
        pytest.param({"quantize": "8da8w"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_quantised_files_give_the_eager_models_tokens(
    scheme: dict[str, Any], runner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = MODELS / f"tiny-{'-'.join(map(str, scheme.values()))}.pte"
    options = ExportOptions(max_seq_len=512, output=output, **scheme)
    export_llama(options)
    metadata = read_metadata(output)
    source = plan(options).source.with_scheme(Scheme.of(metadata))
    model = source.model({name: source.piece(name) for name in piece_names(source.config)})
    prompt = from_bytes(metadata.tokenizer, metadata.tokenizer_kind).encode("The cat")
    text = [1, *prompt]
    for _ in range(64):
        text.append(int(reference(model, [text], [1], 512)[0].argmax()))
    flags = ["--prompt-ids", ",".join(map(str, text[:-64])), "--max-new-tokens", "64", "--format", "json"]
    main([str(output), *flags])
    assert json.loads(capsys.readouterr().out)["token_ids"] == text[-64:]
    assert json.loads(_run(runner, output, *flags).stdout)["token_ids"] == text[-64:]


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", "The dog", "--max-new-tokens", "30"],
        ["--prompt", 'Caf\u00e9 \u65e5\u672c "x"\n', "--max-new-tokens", "20", "--format", "json"],
        ["--temperature", "0.8", "--top-k", "50", "--top-p", "0.9", "--seed", "-1", "--max-new-tokens", "60"],
        ["--prompt-ids", "1,20,30", "--temperature", "1.5", "--seed", "18446744073709551615", "--max-new-tokens", "40"],
        ["--prompt", "<s>one</s>", "--parse-special", "--max-new-tokens", "20", "--threads", "1", "--no-check"],
        ["--prompt", "word " * 90, "--max-new-tokens", "10"],
        ["--prompt", "One day, one day, one day", "--max-new-tokens", "90", "--lookup"],
        ["--prompt", "One day", "--max-new-tokens", "60", "--lookup", "--temperature", "1", "--seed", "9"],
        ["--prompt", "One day", "--max-new-tokens", "700", "--on-full", "slide", "--lookup"],
        ["--prompt", "The dog", "--repetition-penalty", "1.4", "--max-new-tokens", "60", "--format", "json"],
        ["--presence-penalty", "0.5", "--frequency-penalty", "0.25", "--penalty-window", "20", "--temperature", "0.9"],
        ["--min-p", "0.05", "--temperature", "1.3", "--seed", "3", "--frequency-penalty=-0.1", "--top-k", "30"],
        ["--logit-bias", "269=-100", "--logit-bias", "432=2.5e0", "--logit-bias", "269=3", "--max-new-tokens", "40"],
        ["--prompt", "Lily", "--stop", "mom", "--stop", " play\n", "--stop", "mother", "--format", "json"],
        ["--prompt", "Caf\u00e9", "--temperature", "2", "--stop", "\u00e9", "--stop", os.fsdecode(b"\xff\xfe")],
        ["--temperature", "0.8", "--max-new-tokens", "30", "--logprobs", "4", "--min-p", "0.1", "--format", "json"],
        ["--max-new-tokens", "3", "--logprobs", "0", "--format", "json"],
    ],
)
def test_prints_what_python_prints(
    flags: list[str], runner: Path, tiny_pte: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tiny_pte), *flags])
    done = _run(runner, tiny_pte, *flags)
    assert done.returncode == 0, done.stderr
    expected = capsys.readouterr().out
    if "json" in flags:
        ours, theirs = json.loads(done.stdout), json.loads(expected)
        assert ours.pop("timings").keys() == theirs.pop("timings").keys()
        assert _logprobs(ours.pop("logprobs", [])) == pytest.approx(_logprobs(theirs.pop("logprobs", [])), rel=1e-12)
        assert ours == theirs
    else:
        assert done.stdout == expected


def _logprobs(rows: list[dict[str, Any]]) -> list[float]:
    """Returns all log-probabilities, which may differ by rounding of exp and log between the languages."""
    return [number for row in rows for number in (row["logprob"], *(n for pair in row["top_logprobs"] for n in pair))]


def test_benchmark_equals_pythons_in_form(runner: Path, toy_pte: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prefill", "7", "48", "49", "--decode", "2", "16", "47", "48", "--format", "json"]
    bench.main([str(toy_pte), *flags])
    theirs, done = json.loads(capsys.readouterr().out), _run(runner, toy_pte, "--bench", *flags)
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)
    assert ours.keys() == theirs.keys()
    for kind, key in (("prefill", "length"), ("decode", "position")):
        assert [row[key] for row in ours[kind]] == [row[key] for row in theirs[kind]]
        assert all(row.keys() == theirs[kind][0].keys() and row["tokens_per_second"] > 0 for row in ours[kind])
    assert ours["peak_bytes"] < 150e6, "what measures the bandwidth is counted, too"
    refused = _run(runner, toy_pte, "--bench", "--prefill", "512", "--decode", "1000")
    assert refused.returncode == 2
    assert "--prefill and --decode are too large for the 48 positions of " in refused.stderr


def test_a_session_goes_from_one_language_to_the_other(
    runner: Path, tiny_pte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "session"
    flags = ["--prompt", "Once upon a time", "--max-new-tokens", "20", "--session", str(file)]
    main([str(tiny_pte), *flags])
    kept, expected = file.read_bytes(), capsys.readouterr().out
    done = _run(runner, tiny_pte, *flags)
    assert done.stdout == expected, done.stderr
    assert len(file.read_bytes()) == len(kept)
    main([str(tiny_pte), *flags])
    assert capsys.readouterr().out == expected
    file.write_bytes(kept[:-1])
    done = _run(runner, tiny_pte, *flags)
    assert done.returncode == 2
    assert "is damaged: its checksum does not match; save the session again" in done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Returns a function that exports a kind of model for a backend, once."""

    @functools.cache
    def export(name: str, backend: str) -> Path:
        path = tmp_path_factory.mktemp("kinds") / "kind.pte"
        export_kind(KINDS[name], path, backend)
        return path

    return export


COVERED_BY_OTHERS = ("window longer than a chunk", "window longer than the context", "window of one")
SLOW_KINDS = ("fused, alternating windows", "fused, alibi in a window", "fused, learned positions", "fused, parallel")
CASES = [(name, "portable") for name in KINDS if name not in (*COVERED_BY_OTHERS, *SLOW_KINDS)]
SLOW_CASES = [
    *(pytest.param(name, "portable", marks=pytest.mark.slow) for name in SLOW_KINDS),
    *(pytest.param(name, "xnnpack", marks=pytest.mark.slow) for name in ("alternating windows", "alibi", "fused")),
]


@pytest.mark.parametrize(("name", "backend"), [*CASES, *SLOW_CASES])
def test_runs_models_of_every_kind_as_python_does(
    name: str, backend: str, runner: Path, exported: Callable[[str, str], Path]
) -> None:
    """Generates to the end of the context, after prompts shorter and longer than a chunk. Python's logits are compared
    with the eager model's.
    """
    path, model = exported(name, backend), KINDS[name].model
    program = Program(path)
    for length in (1, 7, 8, 26):
        prompt = [(5 * i + length) % VOCABULARY for i in range(length)]
        expected = [step.token for step in generate(Session(program), prompt, GenerationOptions(), Rng(0))]
        logits, _ = recomputed(model, prompt + expected[:-1])
        assert logits[length - 1 :].argmax(-1).tolist() == expected
        done = _run(runner, path, "--format", "json", "--prompt-ids", ",".join(map(str, prompt)))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["token_ids"] == expected
    counted = _run(BUILD / "tests" / "test_allocations", path)
    assert counted.returncode == 0, counted.stdout
    assert " 0 allocations by the runner" in counted.stdout


def test_slides_as_python_does_where_local_blocks_have_their_own_rotary_frequencies(
    runner: Path, exported: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported("fused, local rotary frequencies", "portable")
    flags = ["--prompt-ids", "1,2,3", "--max-new-tokens", "90", "--on-full", "slide", "--format", "json"]
    flags += ["--temperature", "1", "--seed", "3"]
    main([str(path), *flags])
    theirs, done = json.loads(capsys.readouterr().out), _run(runner, path, *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == theirs["token_ids"]
    assert len(theirs["token_ids"]) == 90 > 2 * CONTEXT


HIDDEN = """
    import ctypes, sys
    library = ctypes.CDLL(sys.argv[1])
    for name in ("open", "session_new", "hidden"):
        getattr(library, "llama_runner_" + name).restype = ctypes.c_void_p
    program = ctypes.c_void_p(library.llama_runner_open(sys.argv[2].encode(), ctypes.c_int64(1), 1))
    session = ctypes.c_void_p(library.llama_runner_session_new(program))
    prompt = [int(number) for number in sys.argv[3].split(",")]
    ids = (ctypes.c_int64 * len(prompt))(*prompt)
    assert library.llama_runner_start(session, ids, ctypes.c_size_t(len(prompt)), None) == 0
    assert library.llama_runner_next(session, (ctypes.c_char * 64)()) == 1
    rows, width = ctypes.c_size_t(), ctypes.c_size_t()
    found = library.llama_runner_hidden(session, ctypes.byref(rows), ctypes.byref(width))
    values = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
    print([values[i * width.value : (i + 1) * width.value] for i in range(rows.value)])
"""


@pytest.mark.parametrize("name", ["window", "no cache"])
def test_hidden_states_come_through_the_c_interface(
    name: str, runner: Path, exported: Callable[[str, str], Path]
) -> None:
    path, prompt = exported(name, "portable"), list(range(17))
    session = Session(Program(path))
    session.prefill(prompt)
    call = [sys.executable, "-c", textwrap.dedent(HIDDEN), runner.parent / "libllama_runner.so", path]
    done = _run(*call, ",".join(map(str, prompt)))
    assert done.returncode == 0, done.stderr
    assert session.hidden is not None
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), session.hidden, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0 is invalid; give 0 or more"),
        (["--top-p", "0"], "top-p 0.0 is invalid; give more than 0, up to 1"),
        (["--top-k", "-2"], "top-k -2 is invalid; give 0 (all) or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 is invalid; give 1 or more"),
        (["--min-p", "1.5"], "min-p 1.5 is invalid; give 0 (all) to 1"),
        (["--repetition-penalty", "0"], "repetition-penalty 0.0 is invalid; give more than 0, where 1 is none"),
        (["--presence-penalty", "nan"], "presence-penalty nan is invalid; give a finite number, where 0 is none"),
        (["--frequency-penalty", "inf"], "frequency-penalty inf is invalid; give a finite number, where 0 is none"),
        (["--penalty-window", "0"], "penalty-window 0 is invalid; give 1 or more"),
        (["--logit-bias", "99999=1"], "logit-bias 99999 is invalid; give ids from 0 to 2047"),
        (["--logit-bias", "5"], "'5' is invalid; give an id and a number such as 1724=-2.5"),
        (["--logit-bias", "5=1=2"], "'5=1=2' is invalid; give an id and a number such as 1724=-2.5"),
        (["--stop", ""], "--stop '' is invalid; give at least one character"),
        (["--logprobs", "-1", "--format", "json"], "--logprobs -1 is invalid; give 0 or more"),
        (["--logprobs", "3"], "--logprobs 3 is invalid for --format text; give --format json"),
        (["--threads", "0"], "--threads 0 is invalid; give 1 or more"),
        (["--seed", "x"], "--seed x is invalid"),
        (["--prompt-ids", "1,99999"], "token 99999 is not in the vocabulary; give ids from 0 to 2047"),
        (["--prompt", "word " * 600], "positions are free; shorten it or export with a larger --max-seq-len"),
        (["--format", "xml"], "xml"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_input_is_one_sentence(flags: list[str], message: str, runner: Path, tiny_pte: Path) -> None:
    done = _run(runner, tiny_pte, *flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("size", [0, 20, 100_000])
def test_cut_files_are_refused(size: int, runner: Path, tiny_pte: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pte"
    path.write_bytes(tiny_pte.read_bytes()[:size])
    done = _run(runner, path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {path} is ")


def test_help_has_examples(runner: Path) -> None:
    done = _run(runner, "--help")
    assert done.returncode == 0
    assert 'llama_runner tiny.pte --prompt "Once upon a time"' in done.stdout


def test_stripped_binary_is_small(runner: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "llama_runner"
    subprocess.run(["strip", "-o", stripped, runner], check=True)
    assert stripped.stat().st_size < 1_250_000  # the 1.2 MB of docs/cpp.md


def test_deploy_folder_runs_by_itself(runner: Path, tiny_pte: Path, tmp_path: Path) -> None:
    subprocess.run([CMAKE, "--build", runner.parent, "--target", "deploy"], check=True, capture_output=True)
    folder = tmp_path / "runner"
    shutil.copytree(runner.parent / "deploy", folder)
    libraries = _run("ldd", folder / "llama_runner").stdout
    for name in ("libexecutorch.so", "libpcre2-8.so.0", "libutf8proc.so"):
        assert any(name in line and str(folder) in line for line in libraries.splitlines()), libraries
    done = _run(folder / "llama_runner", tiny_pte, "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr


def test_jni_sample_compiles(tmp_path: Path) -> None:
    javac = shutil.which("javac")
    if javac is None:
        pytest.skip("needs a JDK's headers; install default-jdk-headless")
    include = Path(javac).resolve().parent.parent / "include"
    source = ROOT / "examples" / "jni" / "llama_runner_jni.c"
    flags = ["-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{include}", f"-I{include / 'linux'}"]
    library = tmp_path / "libllama_runner_jni.so"
    includes = f"-I{ROOT / 'cpp_runner' / 'include'}"
    done = _run("cc", *flags, includes, source, "-o", library)
    assert done.returncode == 0, done.stderr


def _built(preset: str, *targets: str) -> Path:
    """Returns the folder of another build of the C++ runner."""
    build = ROOT / "build" / preset
    for command in (["--preset", preset], ["--build", str(build), "-j2", *targets]):
        subprocess.run([CMAKE, *command], cwd=ROOT / "cpp_runner", check=True, capture_output=True)
    return build


@pytest.mark.slow
def test_sessions_in_threads_do_not_race(tiny_pte: Path) -> None:
    build = _built("threads", "--target", "llama_runner_tests")
    done = _run(build / "tests" / "llama_runner_tests", "--gtest_filter=Threads.*")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[  PASSED  ] 2 tests" in done.stdout
    assert "WARNING: ThreadSanitizer" not in done.stderr


@pytest.mark.slow
def test_fuzzing_finds_errors_and_no_crash(tiny_pte: Path) -> None:
    build = _built("sanitize")
    tested = _run(CMAKE.with_name("ctest"), "--test-dir", build, "--output-on-failure")
    assert tested.returncode == 0, tested.stdout
    folder = ROOT / "tests" / "cpp"
    inputs = [
        BUILT_IN / "tokenizer.model",
        folder / "fuzz_tokenizer.json",
        folder / "fuzz_ranks.tiktoken",
    ]
    done = _run(build / "tests" / "fuzz", "60", tiny_pte, *inputs)
    assert done.returncode == 0, done.stdout + done.stderr
