import json
from pathlib import Path

import pytest

from model.errors import InputError
from runtime import batch as command
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.batching import batch
from runtime.text.generation import GenerationOptions, generate
from runtime.text.prompts import prompt_ids, read_prompts
from runtime.text.sampler import Rng, SamplingOptions
from tests.conftest import TOY

PROMPTS = [[1, 2, 3], [5], [7] * 20, [9, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9], [3] * 40, [11]]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batched_texts_equal_single_texts_in_order(temperature: float, three_toys: Path, toy_pte: Path) -> None:
    program, alone = Program(three_toys), Program(toy_pte)
    options = GenerationOptions(SamplingOptions(temperature), max_new_tokens=25, stop_strings=("e",))
    found = list(batch(program, PROMPTS, options, seed=4))
    assert [result.number for result in found] == list(range(len(PROMPTS)))
    for prompt, result in zip(PROMPTS, found, strict=True):
        steps = generate(Session(alone), prompt, options, Rng(4), alone.tokenizer)
        assert [(s.token, s.text, s.finish_reason) for s in result.steps] == [
            (s.token, s.text, s.finish_reason) for s in steps
        ]


def test_a_bad_prompt_is_reported_in_its_place_and_the_others_go_on(three_toys: Path) -> None:
    program, options = Program(three_toys), GenerationOptions(max_new_tokens=3)
    prompts = [[1], [], [2], [TOY.vocab_size], InputError("it is odd"), [1] * (TOY.context + 1), [3]]
    found = list(batch(program, prompts, options))
    assert [len(result.steps) for result in found] == [3, 0, 3, 0, 0, 0, 3]
    errors = [result.error for result in found]
    assert errors[::2] == [None, None, "it is odd", None]
    assert "is empty" in (errors[1] or "")
    assert f"token {TOY.vocab_size} is not in the vocabulary" in (errors[3] or "")
    free = f"only {TOY.context} of {TOY.context} positions are free"
    assert f"has {TOY.context + 1} tokens, but {free}" in (errors[5] or "")
    assert list(batch(program, [], options)) == []


def test_a_bias_outside_the_vocabulary_is_refused(three_toys: Path) -> None:
    options = GenerationOptions(SamplingOptions(logit_bias={TOY.vocab_size: 1.0}))
    with pytest.raises(InputError, match=f"logit-bias {TOY.vocab_size} is invalid"):
        list(batch(Program(three_toys), PROMPTS, options))


def test_the_command_takes_lines_and_objects(
    three_toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, file = Program(three_toys), tmp_path / "prompts"
    flags = [str(three_toys), "--prompts-file", str(file), "--max-new-tokens", "4"]
    file.write_text("The dog\n\n{not JSON\n")
    assert command.main(flags) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["number"] for line in lines] == [0, 1]
    assert "2 prompts, 3 at once; 8 tokens" in captured.err
    ids = prompt_ids(program, "The dog")
    file.write_text(json.dumps({"prompt": "The dog"}) + "\n" + json.dumps({"prompt_ids": ids}) + '\n{"promt": 1}\n')
    assert command.main(flags) == 1
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [objects[0][key] for key in ("token_ids", "text")] == [lines[0][key] for key in ("token_ids", "text")]
    assert objects[1]["token_ids"] == lines[0]["token_ids"]
    assert objects[2]["error"] == 'line 3, {"promt": 1}, is not a prompt; give an object with "prompt" or "prompt_ids"'


def test_a_file_without_prompts_is_refused(three_toys: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    for name, message in (("empty", "has no prompts; give one per line"), ("absent", "cannot be read")):
        with pytest.raises(InputError, match=message):
            command.main([str(three_toys), "--prompts-file", str(tmp_path / name)])


MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.jsonl", MARK + '{"prompt": "a"}\r\n{"prompt": "b"}\r\n', ["a", "b"]),
        ("prompts", MARK + '{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
        ("prompts", '{"prompt": "a\N{LINE SEPARATOR}b"}\n', ["a\N{LINE SEPARATOR}b"]),
        ("prompts", "a\fb\vc\x85d\r\n\n  e\n", ["a\fb\vc\x85d", "  e"]),
        ("prompts", MARK + 'text\n{"prompt": "b"}\n', ["text", '{"prompt": "b"}']),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt":\n{"prompt": "c"}\n', ["a", "line 3 is not JSON", "c"]),
        ("prompts", '{"prompt": "a"}\n"b"\n', ["a", 'line 2, "b", is not a prompt']),
        (
            "a.jsonl",
            "text\n[1]\n" + "[" * 100_000,
            ["line 1 is not JSON", "line 2, [1], is not a prompt", "line 3 is not"],
        ),
    ],
)
def test_lines_end_where_files_end_them_and_a_bad_one_is_named_in_its_place(
    name: str, content: str, texts: list[str], three_toys: Path, tmp_path: Path
) -> None:
    program, file = Program(three_toys), tmp_path / name
    file.write_bytes(content.encode())
    found = read_prompts(file, program)
    assert len(found) == len(texts)
    for each, text in zip(found, texts, strict=True):
        if isinstance(each, InputError):
            assert str(each).startswith(text)
        else:
            assert each == prompt_ids(program, text)
