"""Tests the command `chat`, and C++ against it."""

import io
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from export.checkpoints.layouts import BUILT_IN
from model.errors import InputError
from preproc.chat_template import NAMED, ChatTemplate
from preproc.jinja_template import from_file
from preproc.special_tokens import Part
from preproc.tokenizer import from_bytes, open_tokenizer
from runtime import chat as command
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text import conversation
from runtime.text.conversation import Chat
from runtime.text.generation import GenerationOptions, Step, generate
from runtime.text.sampler import Rng
from tests.conftest import ROOT
from tests.integration.test_cpp_tokenizers import TOKENIZERS, TOOL, _fuzzed, _run, _unpack

GOLDEN = Path(__file__).parents[1] / "golden" / "chat.json"


def typed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces stdin by the text."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


TALK = (
    "Once upon a time\n\n/system Tell a story.\nThe dog \u2603\n/nothing\n/help\n/reset\n/system\nOnce upon a time\n"
    "/exit\nx\n"
)
FLAGS = ["--max-new-tokens", "20", "--system", "Be kind."]


def test_the_command_answers_each_line(
    chat_pte: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(TALK, monkeypatch)
    assert command.main([str(chat_pte), *FLAGS]) == 0
    printed = capsys.readouterr()
    program = Program(chat_pte)
    chat = Chat(program, GenerationOptions(max_new_tokens=20), Rng(0), "Be kind.")
    answers = ["".join(step.text for step in chat.send("Once upon a time"))]
    chat.instruct("Tell a story.")
    answers.append("".join(step.text for step in chat.send("The dog \u2603")))
    chat.reset()
    chat.instruct(None)
    answers.append("".join(step.text for step in chat.send("Once upon a time")))
    assert printed.out == "".join(f"{answer}\n" for answer in answers)
    assert printed.err == f"error: /nothing is unknown; /help lists the commands\n{command._HELP}\n"
    assert program.metadata.stop_ids == (2,)


def test_the_command_reports_a_full_context(
    chat_pte: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(f"{'word ' * 240}\n{'word ' * 260}\n{'word ' * 600}\nOnce\n", monkeypatch)
    command.main([str(chat_pte), "--max-new-tokens", "5"])
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[0] == "the context of 512 tokens is full: the oldest turn was forgotten"
    assert lines[1].startswith("error: the message has ")
    assert len(lines) == 2
    assert printed.out.count("\n") >= 3


def test_a_named_template_replaces_the_files(
    tiny_pte: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="has no chat template"):
        command.main([str(tiny_pte)])
    with pytest.raises(InputError, match="--chat-template llama4 is unknown; choose from llama2"):
        command.main([str(tiny_pte), "--chat-template", "llama4"])
    typed("Once\n", monkeypatch)
    assert command.main([str(tiny_pte), "--chat-template", "mistral", "--max-new-tokens", "5"]) == 0
    ids = NAMED["mistral"].encode([("user", "Once")], open_tokenizer(BUILT_IN / "tokenizer.model"))
    steps = generate(
        Session(Program(tiny_pte)), ids, GenerationOptions(max_new_tokens=5), Rng(0), Program(tiny_pte).tokenizer
    )
    assert capsys.readouterr().out == "".join(step.text for step in steps) + "\n"


def test_ctrl_c_ends_the_answer_but_not_the_chat(
    chat_pte: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talks, before = list[Chat](), signal.getsignal(signal.SIGINT)
    ordinary = conversation.generate

    def interrupted(*arguments: Any) -> Iterator[Step]:
        for count, step in enumerate(ordinary(*arguments)):
            if count == 3 and len(talks[0].messages) == 0:
                signal.raise_signal(signal.SIGINT)
            yield step

    def remembered(*arguments: Any) -> Chat:
        talks.append(Chat(*arguments))
        return talks[0]

    monkeypatch.setattr(conversation, "generate", interrupted)
    monkeypatch.setattr(command, "Chat", remembered)
    typed("Once\nThe dog\n", monkeypatch)
    assert command.main([str(chat_pte), "--max-new-tokens", "9"]) == 0
    (_, once), (_, first), _, (_, second) = talks[0].messages
    steps = list(Chat(Program(chat_pte), GenerationOptions(max_new_tokens=9), Rng(0)).send(once))
    assert first == "".join(step.text for step in steps[:4])
    assert second
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_is_saved_loaded_and_taken_back(
    chat_pte: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved, again = tmp_path / "chat.json", tmp_path / "again.json"
    begin = f"/undo\nOnce upon a time\n/save {saved}\n//The dog\n/undo\n"
    typed(f"{begin}/save\n/load {tmp_path / 'absent'}\n/reset\n/load {saved}\n/save {again}\n", monkeypatch)
    assert command.main([str(chat_pte), *FLAGS]) == 0
    printed = capsys.readouterr()
    chat = Chat(Program(chat_pte), GenerationOptions(max_new_tokens=20), Rng(0), "Be kind.")
    first, second = ("".join(step.text for step in chat.send(text)) for text in ("Once upon a time", "/The dog"))
    assert printed.out == f"{first}\n{second}\n"
    texts = {"system": "Be kind.", "user": "Once upon a time", "assistant": first}
    assert json.loads(saved.read_text()) == [{"role": role, "content": text} for role, text in texts.items()]
    assert again.read_bytes() == saved.read_bytes()
    assert printed.err.splitlines() == [
        "error: there is no message to take back; send one first",
        f"saved 3 messages to {saved}",
        "took back: /The dog",
        "error: /save lacks the name of a file; give one, such as /save chat.json",
        f"error: {tmp_path}/absent cannot be read (No such file or directory); give a file that a chat was saved to",
        f"loaded 3 messages from {saved}",
        f"saved 3 messages to {again}",
    ]


def test_ctrl_c_ends_a_long_prefill(
    chat_pte: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ordinary, positions = conversation.Chat.prefill, list[int]()

    def interrupted(chat: Chat) -> Iterator[tuple[int, int]]:
        for position, length in ordinary(chat):
            positions.append(position)
            signal.raise_signal(signal.SIGINT)
            yield position, length

    monkeypatch.setattr(conversation.Chat, "prefill", interrupted)
    typed(f"{'word ' * 300}\nOnce\n", monkeypatch)
    assert command.main([str(chat_pte), "--max-new-tokens", "9"]) == 0
    printed = capsys.readouterr()
    assert len(positions) == 1
    assert printed.err == "the message is not kept, because its answer had not begun\n"
    once = "".join(
        step.text for step in Chat(Program(chat_pte), GenerationOptions(max_new_tokens=9), Rng(0)).send("Once")
    )
    assert printed.out == f"\n{once}\n"


# --- C++ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("talk", "flags"),
    [
        (TALK.replace("/help\n", ""), FLAGS),  # C++ has fewer commands
        (
            "Once upon a time\nAnd then?\n<s>Why</s>\n",
            ["--temperature", "0.9", "--seed", "3", "--max-new-tokens", "40"],
        ),
        (" ".join(["word"] * 200) + "\nOne\nTwo" + " word" * 250 + "\n" + "word " * 600 + "\nLast", []),
        (
            "a\xffb\n\r\nline\r\none\rline\n  spaced\t\n\x1c\n".encode("latin-1"),
            ["--max-new-tokens", "9", "--stop", "."],
        ),
    ],
)
def test_cpp_prints_what_python_prints(talk: str | bytes, flags: list[str], runner: Path, chat_pte: Path) -> None:
    given_bytes = talk.encode() if isinstance(talk, str) else talk
    calls = [[sys.executable, "-m", "runtime.chat", chat_pte], [runner, chat_pte, "--chat"]]
    theirs, ours = (
        subprocess.run([*map(str, call), *flags], input=given_bytes, capture_output=True, cwd=ROOT, check=False)
        for call in calls
    )
    assert (ours.returncode, theirs.returncode) == (0, 0), ours.stderr.decode() + theirs.stderr.decode()
    assert ours.stdout == theirs.stdout
    assert ours.stderr == theirs.stderr
    assert ours.stdout


def test_cpp_refuses_what_python_refuses(runner: Path, tiny_pte: Path, chat_pte: Path) -> None:
    done = subprocess.run([runner, tiny_pte, "--chat"], capture_output=True, text=True, input="", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the file has no chat template; export it again with --chat-template\n"
    for flags, message in ((["--seed", "x"], "--seed x"), (["--prompt", "x"], "--prompt"), (["--bench"], "--bench")):
        call = [runner, chat_pte, "--chat", *flags]
        done = subprocess.run(call, capture_output=True, text=True, input="", check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr


def test_cpp_ends_an_answer_at_ctrl_c_and_goes_on(runner: Path, chat_pte: Path) -> None:
    """All messages are sent at once, so that an answer is being generated when the signal arrives."""
    messages = b"Once upon a time\n" * 40
    with subprocess.Popen([runner, chat_pte, "--chat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(messages)
        process.stdin.flush()
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        rest = process.stdout.read()
        assert process.wait() == 0
    whole = subprocess.run([runner, chat_pte, "--chat"], input=messages, capture_output=True, check=True).stdout
    assert whole.startswith(first)
    assert first + rest != whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_cpp_encodes_parts_as_python_does(name: str, tmp_path: Path) -> None:
    """Parts are separated by the byte 0xFF, which does not occur in text. Every second one, from the first, may contain
    special tokens.
    """
    data = TOKENIZERS[name]()
    expected = from_bytes(data)
    rng = random.Random(11)
    specials = [*expected.specials, *expected.fixed][:20]
    talks = []
    for _ in range(1000):
        texts = [_fuzzed(rng).decode(errors="replace") for _ in range(rng.randrange(1, 6))]
        talks.append(
            [rng.choice(["", text, text, f"{text}{rng.choice(specials)} x"]) for text in texts] if specials else texts
        )
    answers = _run(TOOL, data, [("p", b"\xff".join(map(str.encode, texts))) for texts in talks], tmp_path / name)
    for texts, answer in zip(talks, answers, strict=True):
        assert _unpack(answer) == expected.encode_parts([Part(text, i % 2 == 0) for i, text in enumerate(texts)]), texts


def test_golden() -> None:
    """tests/cpp/test_chat.cpp reads the same golden file."""
    tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    golden = json.loads(GOLDEN.read_text())
    cases, now = golden["cases"], datetime(*golden["now"])
    assert len(cases) > 50
    for case in cases:
        template = from_file(json.dumps(case["template"]))
        assert isinstance(template, ChatTemplate)
        messages = [(role, content) for role, content in case["messages"]]
        assert template.text(messages, now) == case["text"]
        ids = tokenizer.encode_parts(template.parts(messages, now))
        assert ids == case["ids"], "run python -m tests.golden.generate"
        assert template.end_id(tokenizer, tokenizer.bos_id) == case["end_id"]
