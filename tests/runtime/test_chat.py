"""Tests chats: Python against whole texts run from scratch, C++ against Python."""

import io
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from tokenizers import AddedToken, models

from export.checkpoints.layouts import BUILT_IN
from export.planning.plan import ExportOptions
from model.errors import InputError
from preproc.chat_template import NAMED, ChatTemplate, Message, SystemPlace
from preproc.jinja_template import from_file, to_file
from preproc.special_tokens import Part
from preproc.tokenizer import HuggingFaceTokenizer, from_bytes, open_tokenizer
from runtime import chat as command
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text import conversation
from runtime.text.conversation import Chat
from runtime.text.generation import GenerationOptions, Step, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.conftest import MODELS, ROOT, exported
from tests.integration.test_cpp_tokenizers import TOKENIZERS, TOOL, _fuzzed, _run, _unpack
from tests.support.kinds import CONTEXT, KINDS, EagerSteps

GOLDEN = Path(__file__).parents[1] / "golden" / "chat.json"
TEMPLATE = ChatTemplate("<s>", ">", "</s><s>", ">", system=SystemPlace("<s>", "|"))


def _letters() -> HuggingFaceTokenizer:
    """Returns a tokenizer with a token per letter, few enough for the models of tests.support.kinds."""
    vocabulary = {char: i for i, char in enumerate("?abcdefghijklmnopqrstuvwxyz >|ABCDEFGHIJKLMNOPQRSTUVWXYZ")}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    model.add_special_tokens([AddedToken(text, normalized=False) for text in ("<s>", "</s>")])
    return HuggingFaceTokenizer(model.to_str().encode())


class Talker(EagerSteps):
    """A random model of a kind, with a tokenizer and a chat template."""

    def __init__(self, kind: str) -> None:
        super().__init__(KINDS[kind])
        self.tokenizer = _letters()
        self.metadata = replace(self.metadata, chat_template=json.dumps(to_file(None, TEMPLATE)))


TALKERS = {kind: Talker(kind) for kind in ("fused", "window", "no cache")}
OPTIONS = GenerationOptions(SamplingOptions(temperature=1.0), max_new_tokens=4)


def fresh(talker: Talker, messages: list[Message], seed: int) -> list[Step]:
    """Generates the answer to all messages in a new session."""
    ids = TEMPLATE.encode(messages, talker.tokenizer)
    options = replace(OPTIONS, stop_ids=(talker.tokenizer.specials["</s>"],))
    return list(generate(Session(talker), ids, options, Rng(seed), talker.tokenizer))


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.text("abc XYZ", max_size=9), st.sampled_from([1, 3, 99])),
        st.tuples(st.just("instruct"), st.one_of(st.none(), st.text("sys", max_size=3)), st.just(0)),
        st.tuples(st.just("reset"), st.none(), st.just(0)),
    ),
    max_size=8,
)


@pytest.mark.parametrize("kind", TALKERS)
@settings(max_examples=20)
@given(actions=ACTIONS)
def test_every_answer_equals_that_of_a_new_session(kind: str, actions: list[tuple[str, Any, int]]) -> None:
    talker, rng = TALKERS[kind], Rng(5)
    chat = Chat(talker, OPTIONS, rng)  # type: ignore[arg-type]
    for action, text, count in actions:
        if action == "reset":
            chat.reset()
            assert chat.messages == []
        elif action == "instruct":
            chat.instruct(text)
        else:
            before, seed = list(chat.messages), rng.state
            steps = []
            for step in chat.send(text):
                steps.append(step)
                if len(steps) == count:
                    break
            chat.stop()
            *kept, asked, answer = chat.messages
            assert kept == before[2 * chat.forgotten :]
            assert asked == ("user", text)
            assert answer == ("assistant", "".join(step.text for step in steps))
            system = [] if chat.system is None else [("system", chat.system)]
            assert steps == fresh(talker, [*system, *kept, asked], seed)[: len(steps)]
            assert chat.forgotten == 0 or len(TEMPLATE.encode([*system, *before, asked], talker.tokenizer)) > 30


def test_a_message_ends_the_answer_before_it() -> None:
    chat = Chat(TALKERS["fused"], OPTIONS, Rng(0))  # type: ignore[arg-type]
    steps = chat.send("abc")
    kept_text = next(steps).text
    assert len(list(chat.send("de"))) == 4
    assert chat.messages[:3] == [("user", "abc"), ("assistant", kept_text), ("user", "de")]
    chat.send("never looked at")
    assert len(chat.messages) == 4
    assert list(steps) == []
    next(chat.send("f"))
    chat.reset()
    assert chat.messages == []


def prefilled(chat: Chat) -> list[int]:
    """Returns a list to which every later prefill appends its length; single tokens are not counted."""
    lengths = list[int]()
    prefill = chat._session.prefill

    def spy(tokens: list[int]) -> Any:
        if len(tokens) > 1:
            lengths.append(len(tokens))
        return prefill(tokens)

    chat._session.prefill = spy  # type: ignore[method-assign,assignment]
    return lengths


def test_only_new_tokens_are_prefilled() -> None:
    chat = Chat(TALKERS["fused"], GenerationOptions(max_new_tokens=3), Rng(0))  # type: ignore[arg-type]
    lengths = prefilled(chat)
    for message in ("abc", "de", "f"):
        assert len(list(chat.send(message))) == 3
    assert lengths[0] == len("<abc>")
    answered = 1  # the last token of an answer is not in the cache yet
    assert lengths[1:] == [answered + len("/<de>"), answered + len("/<f>")]
    chat.instruct("s")
    list(chat.send("g"))
    assert lengths[3] == chat._session.position - 1 - 2, "only BOS is still right"


def test_a_full_context_drops_the_oldest_turns_but_not_the_system_message() -> None:
    talker = TALKERS["fused"]
    chat = Chat(talker, OPTIONS, Rng(0), system="sys")  # type: ignore[arg-type]
    forgotten = []
    for turn in range(8):
        list(chat.send(f"abcdef{'xyz'[turn % 3]}"))
        forgotten.append(chat.forgotten)
        assert talker.tokenizer.encode("sys") == chat._session.tokens[1:4]
    assert forgotten[0] == 0
    assert set(forgotten[3:]) == {1}
    assert len(chat.messages) == 4
    before = list(chat.messages)
    with pytest.raises(InputError, match=rf"has \d+ tokens .* but the context only {CONTEXT}; shorten it"):
        chat.send("a" * CONTEXT)
    assert chat.messages == before
    assert list(chat.send("a" * (CONTEXT - len("<sys|>"))))[-1].finish_reason == "length"
    assert (len(chat.messages), chat.is_full) == (2, True)


def test_a_stop_token_is_no_text_and_ends_the_answer() -> None:
    talker = TALKERS["fused"]
    first = list(Chat(talker, OPTIONS, Rng(0)).send("abc"))  # type: ignore[arg-type]
    second = talker.tokenizer.piece(first[1].token, first=False).decode()
    assert second
    again = f"{second}<s>"
    letters = _letters()
    letters.specials = {**letters.specials, second: first[1].token}
    stand_in = Talker("fused")
    stand_in.tokenizer = letters
    template = replace(TEMPLATE, again=again)
    steps = list(Chat(stand_in, OPTIONS, Rng(0), template=template).send("abc"))  # type: ignore[arg-type]
    assert [step.token for step in steps] == [step.token for step in first[:2]]
    assert (steps[-1].finish_reason, steps[-1].text) == ("stop", "")


def test_a_file_without_a_template_is_refused_with_the_flag(toy_program: Program) -> None:
    with pytest.raises(InputError, match="no chat template; export it again with --chat-template llama2, llama3"):
        Chat(toy_program, OPTIONS, Rng(0))
    with pytest.raises(InputError, match="supports no system message"):
        Chat(toy_program, OPTIONS, Rng(0), "sys", NAMED["gemma"])


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_pte() -> Path:
    """The built-in model with Llama 2's template."""
    return exported(ExportOptions(max_seq_len=512, chat_template="llama2", output=MODELS / "chat.pte"))


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


def test_lines_are_edited_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C discards the typed line; at an empty prompt, Ctrl-C and Ctrl-D end the chat."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    back = "\x7f"
    for keys in ("\x03", "\x04"):
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(f"hellx{back}o\rdropped\x03bye\r{keys}never\r")
            assert list(command._lines()) == ["hello", "bye"]


# --- C++ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("talk", "flags"),
    [
        (TALK, FLAGS),
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
