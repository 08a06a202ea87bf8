import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from export.checkpoints.layouts import BUILT_IN
from model.errors import InputError
from preproc.tokenizer import StreamDecoder, open_tokenizer
from runtime import generate as command
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions, Step, StopFilter, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.conftest import ROOT, TOY


def ids(program: Program, prompt: list[int], options: GenerationOptions, seed: int = 0) -> list[Step]:
    return list(generate(Session(program), prompt, options, Rng(seed), program.tokenizer))


@pytest.mark.parametrize("length", [1, 7, 8, TOY.context - 1, TOY.context])
def test_a_prompt_of_p_in_a_context_of_t_is_followed_by_t_minus_p_plus_1_tokens(
    toy_program: Program, length: int
) -> None:
    steps = ids(toy_program, list(range(length)), GenerationOptions())
    assert len(steps) == TOY.context - length + 1
    assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["length"]


def test_a_longer_prompt_is_refused_with_both_numbers(toy_program: Program) -> None:
    with pytest.raises(InputError, match="49 tokens, but only 48 of 48 positions"):
        ids(toy_program, [1] * 49, GenerationOptions())


def test_max_new_tokens_ends_with_length_and_a_stop_id_with_stop(toy_program: Program) -> None:
    steps = ids(toy_program, [1, 2], GenerationOptions(max_new_tokens=5))
    assert [step.finish_reason for step in steps] == [None] * 4 + ["length"]
    stop = steps[3].token
    first = next(i for i, step in enumerate(steps) if step.token == stop)
    stopped = ids(toy_program, [1, 2], GenerationOptions(max_new_tokens=5, stop_ids=(stop,)))
    assert [step.token for step in stopped] == [step.token for step in steps[: first + 1]]
    assert (stopped[-1].finish_reason, stopped[-1].text) == ("stop", "")


def test_one_seed_gives_one_text_and_another_a_different_one(toy_program: Program) -> None:
    options = GenerationOptions(SamplingOptions(temperature=1.0), max_new_tokens=20)
    assert ids(toy_program, [1], options, seed=3) == ids(toy_program, [1], options, seed=3)
    assert ids(toy_program, [1], options, seed=3) != ids(toy_program, [1], options, seed=4)


@given(
    pieces=st.lists(st.text("ab☃", max_size=5), max_size=8),
    stops=st.lists(st.text("ab☃", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_filter_never_gives_more_than_the_text_before_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
    stop_filter = StopFilter(stops)
    taken = given_out = ""
    for piece in pieces:
        taken += piece
        given_out += stop_filter.add(piece)
        assert expected.startswith(given_out)
        if not stop_filter.stopped:
            held = taken.removeprefix(given_out)
            assert not held or any(stop.startswith(held) for stop in stops) or any(stop in held for stop in stops)
            assert len(held) < max(map(len, stops), default=1)
    assert given_out + stop_filter.finish() == expected
    assert stop_filter.stopped == any(stop in text for stop in stops)


@given(text=st.text("ab☃", max_size=12), stops=st.lists(st.text("ab☃", min_size=1, max_size=4), max_size=3),
       cuts=st.sets(st.integers(1, 11)))  # fmt: skip
def test_a_stop_filter_does_not_depend_on_how_text_is_cut(text: str, stops: list[str], cuts: set[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    in_pieces, whole = StopFilter(stops), StopFilter(stops)
    said = "".join(in_pieces.add(text[a:b]) for a, b in pairwise(edges)) + in_pieces.finish()
    assert (said, in_pieces.stopped) == (whole.add(text) + whole.finish(), whole.stopped)


def test_a_stop_string_ends_the_text_before_it(toy_program: Program) -> None:
    sampling = SamplingOptions(temperature=1.5)
    text = "".join(step.text for step in ids(toy_program, [1], GenerationOptions(sampling, 30)))
    stop = text[len(text) // 2 :][:7]
    steps = ids(toy_program, [1], GenerationOptions(sampling, 30, stop_strings=(stop, "never said")))
    assert "".join(step.text for step in steps) == text[: text.find(stop)]
    assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["stop"]


def test_a_stop_string_without_a_tokenizer_is_refused(toy_program: Program) -> None:
    steps = generate(Session(toy_program), [1], GenerationOptions(stop_strings=("x",)), Rng(0))
    with pytest.raises(InputError, match="--stop 'x' needs a tokenizer"):
        next(steps)


def test_penalties_count_the_prompt_and_the_generated_text(toy_program: Program) -> None:
    steps = ids(toy_program, [1, 2, 3], GenerationOptions(SamplingOptions(presence_penalty=1e6, penalty_window=100)))
    tokens = [1, 2, 3, *(step.token for step in steps)]
    assert len(set(tokens)) == len(tokens) == TOY.context + 1


def test_a_bias_beyond_the_vocabulary_is_refused(toy_program: Program) -> None:
    with pytest.raises(InputError, match="logit-bias 2048 is invalid; give ids from 0 to 2047"):
        ids(toy_program, [1], GenerationOptions(SamplingOptions(logit_bias={2047: 1.0, 2048: 1.0})))


def test_log_probabilities_do_not_depend_on_the_sampler(toy_program: Program) -> None:
    biased = SamplingOptions(temperature=2.0, top_k=3, repetition_penalty=2.0, logit_bias={7: 3.0})
    steps = ids(toy_program, [1, 2], GenerationOptions(biased, max_new_tokens=6, logprobs=4))
    session = Session(toy_program)
    logits = session.prefill([1, 2])
    for step in steps:
        expected = torch.log_softmax(logits.double(), 0)
        assert step.logprob == pytest.approx(float(expected[step.token]), rel=1e-12)
        assert [token for token, _ in step.top_logprobs] == expected.topk(4).indices.tolist()
        assert [value for _, value in step.top_logprobs] == pytest.approx(expected.topk(4).values.tolist(), rel=1e-12)
        logits = session.decode(step.token)


@pytest.mark.parametrize("prompt", ["", "Once upon", "The dog \N{SNOWMAN}"])
def test_the_text_continues_the_prompt(toy_program: Program, prompt: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(BUILT_IN / "tokenizer.model"))
    start = [1, *theirs.encode(prompt)]
    steps = ids(toy_program, start, GenerationOptions(SamplingOptions(temperature=1.5), max_new_tokens=20))
    assert prompt + "".join(step.text for step in steps) == theirs.decode(start + [step.token for step in steps])


def test_a_character_split_across_the_prompts_end_is_completed() -> None:
    tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    snowman = [next(t for t in range(300) if tokenizer.piece(t, False) == bytes([b])) for b in "☃".encode()]
    decoder = StreamDecoder(tokenizer, snowman[:2])
    assert decoder.add(snowman[2]) == "☃"


def test_the_command_prints_text_or_json_and_its_statistics(toy_pte: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(toy_pte), "--prompt", "Once", "--max-new-tokens", "6"]) == 0
    text = capfd.readouterr()
    assert command.main([str(toy_pte), "--prompt", "Once", "--max-new-tokens", "6", "--format", "json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["text"] == text.out
    assert result["prompt_ids"] == [1, *open_tokenizer(BUILT_IN / "tokenizer.model").encode("Once")]
    assert len(result["token_ids"]) == 6
    assert result["finish_reason"] == "length"
    assert all(result["timings"][stage] > 0 for stage in ("load", "prefill", "decode"))
    for part in ("load", "prefill", "tok/s", "first token", "decode 5 tokens", "peak memory"):
        assert part in text.err


def test_the_command_takes_every_option_of_the_sampler(toy_pte: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt-ids", "1,2", "--max-new-tokens", "5", "--format", "json", "--temperature", "0.9", "--top-k", "9"]
    flags += ["--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.5", "--presence-penalty", "0.5"]
    flags += ["--frequency-penalty", "-0.25", "--penalty-window", "3", "--logit-bias", "5=4.5", "--logit-bias", "6=4"]
    assert command.main([str(toy_pte), *flags, "--logprobs", "2"]) == 0
    result = json.loads(capfd.readouterr().out)
    program = Program(toy_pte)
    sampling = SamplingOptions(0.9, 9, 0.9, 0.01, 1.5, 0.5, -0.25, 3, {5: 4.5, 6: 4.0})
    steps = ids(program, [1, 2], GenerationOptions(sampling, 5, program.metadata.stop_ids, logprobs=2))
    assert result["token_ids"] == [step.token for step in steps]
    assert [row["logprob"] for row in result["logprobs"]] == [step.logprob for step in steps]
    assert [row["top_logprobs"] for row in result["logprobs"]] == [
        [list(pair) for pair in step.top_logprobs] for step in steps
    ]


@pytest.mark.parametrize("value", ["5", "x=1", "5=x", "=", "5=1=2"])
def test_a_malformed_bias_is_refused(value: str, toy_pte: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([str(toy_pte), "--logit-bias", value])
    assert caught.value.code == 2
    assert f"'{value}' is invalid; give an id and a number such as 1724=-2.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--stop", ""], "--stop '' is invalid; give at least one character"),
        (["--logprobs", "-1", "--format", "json"], "--logprobs -1 is invalid; give 0 or more"),
        (["--logprobs", "3"], "--logprobs 3 is invalid for --format text; give --format json"),
        (["--logit-bias", "99999=1"], "logit-bias 99999 is invalid; give ids from 0 to 2047"),
        (["--threads", "0"], "--threads 0"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--prompt-ids", "1,99999"], "token 99999 is not in the vocabulary"),
        (["--prompt", "word " * 60], "positions are free"),
    ],
)
def test_the_command_refuses_impossible_flags(toy_pte: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command.main([str(toy_pte), *flags])


def test_a_missing_file_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    """Runs in a new process, whose exit code is checked."""
    call = [sys.executable, "-m", "runtime.generate", str(tmp_path / "absent.pte")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_ends_the_command_quietly(toy_pte: Path) -> None:
    call = f"{sys.executable} -m runtime.generate {toy_pte} --temperature 1 | head -c 3"
    done = subprocess.run(call, shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert len(done.stdout) == 3
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_stories260k_prints_what_llama2c_prints(
    stories_pte: Path, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command.main([str(stories_pte), "--max-new-tokens", "200"])
    expected = (shared / "stories260K" / "greedy-200.txt").read_bytes()
    assert len(expected) == 464
    assert capfd.readouterr().out.encode() == expected


@pytest.mark.parametrize("name", ["prompt.txt", "-"])
def test_cpp_reads_a_prompt_file_as_python_does(name: str, runner: Path, toy_pte: Path, tmp_path: Path) -> None:
    """Tests a short file, and one too large for a command line, which exceeds the context."""
    short = (
        "\N{ZERO WIDTH NO-BREAK SPACE}Two\nlines, gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n\r\n".encode() + b"\xff\n"
    )
    for content, code in ((short, 0), (b"word " * 60_000, 2)):
        (tmp_path / "prompt.txt").write_bytes(content)
        file = "-" if name == "-" else str(tmp_path / name)
        flags = [str(toy_pte), "--prompt-file", file, "--format", "json", "--max-new-tokens", "2"]
        python = [sys.executable, "-m", "runtime.generate"]
        ours, theirs = (
            subprocess.run([*program, *flags], input=content, capture_output=True, cwd=ROOT, check=False)
            for program in ([str(runner)], python)
        )
        assert (ours.returncode, theirs.returncode) == (code, code), (ours.stderr, theirs.stderr)
        if code:
            assert ours.stderr == theirs.stderr
            assert b"60" in ours.stderr
        else:
            found = [json.loads(done.stdout) for done in (ours, theirs)]
            assert found[0]["prompt_ids"] == found[1]["prompt_ids"]
            text = content.decode("utf-8-sig", "replace").removesuffix("\n")
            program = Program(toy_pte)
            assert program.tokenizer
            assert found[0]["prompt_ids"][1:] == program.tokenizer.encode(text)


def test_a_prompt_file_that_is_absent_is_named(runner: Path, toy_pte: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([runner, toy_pte, *arguments], capture_output=True, text=True, check=False)

    done = run("--prompt-file", "absent.txt")
    assert (done.returncode, done.stderr) == (
        2,
        "error: absent.txt cannot be read (No such file or directory); give a text file\n",
    )
    both = run("--prompt-file", "a.txt", "--prompt", "x")
    assert both.returncode == 2
    assert "excludes" in both.stderr
