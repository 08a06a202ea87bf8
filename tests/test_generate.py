import json
from pathlib import Path

import pytest

from model.checkpoint import BUILT_IN
from model.errors import InputError
from preproc.tokenizer import open_tokenizer
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


def test_text_adds_up_to_the_decoded_ids(toy_program: Program) -> None:
    from preproc.tokenizer import decode

    steps = ids(toy_program, [1], GenerationOptions(SamplingOptions(temperature=1.5), max_new_tokens=40))
    tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    assert "".join(step.text for step in steps) == decode(tokenizer, [step.token for step in steps])


def test_the_command_prints_text_or_json_and_its_statistics(toy_pte: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(toy_pte), "--prompt", "Once", "--max-new-tokens", "6"]) == 0
    text = capfd.readouterr()
    assert command.main([str(toy_pte), "--prompt", "Once", "--max-new-tokens", "6", "--format", "json"]) == 0
    steps = [Step(**json.loads(line)) for line in capfd.readouterr().out.splitlines()]
    assert "".join(step.text for step in steps) == text.out
    assert len(steps) == 6
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


def test_stories260k_prints_what_llama2c_prints(
    stories_pte: Path, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command.main([str(stories_pte), "--max-new-tokens", "200"])
    expected = (shared / "stories260K" / "greedy-200.txt").read_bytes()
    assert len(expected) == 464
    assert capfd.readouterr().out.encode() == expected
