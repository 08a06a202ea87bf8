import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from model.checkpoint import BUILT_IN
from model.errors import InputError
from preproc.tokenizer import StreamDecoder, open_tokenizer
from runtime import generate as command
from runtime.generate import GenerationOptions, Step, generate
from runtime.program import Program
from runtime.sampler import Rng, SamplingOptions
from runtime.session import Session
from tests.conftest import TOY


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


@pytest.mark.parametrize("prompt", ["", "Once upon", "The dog \N{SNOWMAN}"])
def test_the_text_goes_on_where_the_prompt_ends(toy_program: Program, prompt: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(BUILT_IN / "tokenizer.model"))
    start = [1, *theirs.encode(prompt)]
    steps = ids(toy_program, start, GenerationOptions(SamplingOptions(temperature=1.5), max_new_tokens=20))
    assert prompt + "".join(step.text for step in steps) == theirs.decode(start + [step.token for step in steps])


def test_a_character_begun_in_the_prompt_is_given_out_when_it_is_complete() -> None:
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
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
    """In a fresh process, as every command ends."""
    call = [sys.executable, "-m", "runtime.generate", str(tmp_path / "absent.pte")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_ends_the_command_quietly(toy_pte: Path) -> None:
    call = f"{sys.executable} -m runtime.generate {toy_pte} --temperature 1 | head -c 3"
    done = subprocess.run(call, shell=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
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
