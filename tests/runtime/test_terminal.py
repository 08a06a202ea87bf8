"""Tests what the commands show on a terminal, on a pseudo-terminal."""

import json
import os
import re
from pathlib import Path

import pytest

from runtime.cli import terminal
from runtime.engine.program import Program
from runtime.text.conversation import Chat
from runtime.text.generation import GenerationOptions, Step
from runtime.text.sampler import Rng
from tests.support.terminal import Terminal

BACK, UP, CTRL_C, CTRL_D = "\x7f", "\x1b[A", "\x03", "\x04"
COLOUR = re.compile(rb"\x1b\[[0-9;]*[39][0-7]m|\x1b\[[0-9;]*[34]8;[0-9;]*m")


def answer(file: Path, *messages: str, count: int = 12) -> str:
    """Returns the answer to the last message, as lines of a terminal."""
    chat = Chat(Program(file), GenerationOptions(max_new_tokens=count), Rng(0))
    return ["".join(step.text for step in chat.send(message)) for message in messages][-1].replace("\n", "\r\n")


def test_a_chat_is_edited_stopped_and_ended_with_keys(chat_pte: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    with Terminal("runtime.chat", str(chat_pte), "--max-new-tokens", "12") as shown:
        assert f"load {chat_pte}" in shown.wait_for("> ")
        shown.type(f"The dof{BACK}g\r")
        shown.wait_for("The dog")
        assert answer(chat_pte, "The dog") in shown.wait_for("\n> ")
        shown.type(f"dropped{CTRL_C}")
        shown.wait_for("\n> ")
        shown.type(f"{UP}s\r")
        shown.wait_for("The dogs")
        assert answer(chat_pte, "The dog", "The dogs") in shown.wait_for("\n> ")
        shown.type("/undo\r")
        shown.wait_for("took back: The dogs\r\n")
        shown.wait_for("> ")
        shown.type(f"/save {saved}\r")
        shown.wait_for(f"saved 2 messages to {saved}\r\n")
        shown.wait_for("> ")
        shown.type("/nothing\r")
        shown.wait_for("error: /nothing is unknown; /help lists the commands\r\n")
        shown.wait_for("> ")
        assert COLOUR.search(shown.screen)
        shown.type(CTRL_D)
        assert shown.wait() == 0
    assert [message["role"] for message in json.loads(saved.read_text())] == ["user", "assistant"]


def test_ctrl_c_ends_an_answer_and_at_an_empty_prompt_the_chat(chat_pte: Path) -> None:
    with Terminal("runtime.chat", str(chat_pte), "--logit-bias", "2=-100") as shown:
        shown.wait_for("> ")
        shown.type("Once upon a time\r")
        shown.wait_for(answer(chat_pte, "Once upon a time")[:20])
        shown.type(CTRL_C)
        shown.wait_for("\r\n")
        shown.wait_for("> ")
        shown.type("/undo\r")
        shown.wait_for("took back: Once upon a time\r\n")
        shown.wait_for("> ")
        shown.type(CTRL_C)
        assert shown.wait() == 0


def test_no_color_takes_colours_away_and_a_file_gets_only_the_answers(chat_pte: Path, tmp_path: Path) -> None:
    flags = [str(chat_pte), "--max-new-tokens", "12"]
    with Terminal("runtime.chat", *flags, env={"NO_COLOR": "1"}, redirect=f">{tmp_path / 'out'}") as shown:
        shown.wait_for("> ")
        shown.type("The dog\r")
        shown.wait_for("prefill")
        shown.wait_for("\r> ")
        shown.type("/nothing\r")
        shown.wait_for("error: /nothing is unknown")
        shown.wait_for("> ")  # before, Ctrl-D would be a key of no prompt
        shown.type(CTRL_D)
        assert shown.wait() == 0
        assert not COLOUR.search(shown.screen)
    assert (tmp_path / "out").read_text() == answer(chat_pte, "The dog").replace("\r\n", "\n") + "\n"


def test_a_long_prompt_shows_its_progress_before_the_text(chat_pte: Path) -> None:
    prompt = "word " * 400
    with Terminal("runtime.generate", str(chat_pte), "--prompt", prompt, "--max-new-tokens", "5") as shown:
        shown.wait_for("prefill")
        shown.wait_for("% left")
        shown.wait_for("\nload ")
        assert shown.wait() == 0


def test_nothing_is_shown_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert not os.isatty(2), "pytest captures what is written"
    steps, done = [Step(1, "a"), Step(2, "b")], list[int]()

    def prefill() -> "list[tuple[int, int]]":
        done.append(1)
        return [(1, 2)]

    assert list(terminal.until_first("prefill", prefill(), iter(steps))) == steps
    assert list(terminal.until_first("prefill", [], iter([]))) == []
    terminal.say("a line", "red")
    assert capfd.readouterr() == ("", "a line\n")
