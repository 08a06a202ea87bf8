"""Tests conversations against whole texts run from scratch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models

from model.errors import InputError
from preproc.chat_template import NAMED, ChatTemplate, Message, SystemPlace
from preproc.jinja_template import to_file
from preproc.tokenizer import HuggingFaceTokenizer
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.conversation import Chat
from runtime.text.generation import GenerationOptions, Step, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.support.kinds import CHUNK, CONTEXT, KINDS, EagerSteps

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


def test_an_exchange_is_taken_back_and_nothing_is_run_again() -> None:
    talker = TALKERS["fused"]
    chat = Chat(talker, GenerationOptions(max_new_tokens=3), Rng(0))  # type: ignore[arg-type]
    lengths = prefilled(chat)
    list(chat.send("abc"))
    kept = list(chat.messages)
    list(chat.send("de"))
    assert chat.undo() == "de"
    assert chat.messages == kept
    lengths.clear()
    list(chat.send("fg"))
    assert lengths == [len("fg>")], "all before the message taken back is still in the KV cache"
    assert (chat.undo(), chat.undo()) == ("fg", "abc")
    with pytest.raises(InputError, match="no message to take back; send one first"):
        chat.undo()


def test_an_answer_does_not_depend_on_whether_its_prefill_was_run() -> None:
    text = "abc " * 6
    chats = [Chat(TALKERS["fused"], OPTIONS, Rng(0)) for _ in range(2)]  # type: ignore[arg-type]
    one, other = (chat.send(text) for chat in chats)
    length = len(TEMPLATE.encode([("user", text)], TALKERS["fused"].tokenizer))
    assert list(chats[1].prefill()) == [(CHUNK, length), (2 * CHUNK, length), (3 * CHUNK, length)]
    assert list(one) == list(other)


@pytest.mark.parametrize("system", [None, "", "be \N{SNOWMAN}"])
def test_a_conversation_goes_on_where_it_was_saved(system: str | None, tmp_path: Path) -> None:
    rng = Rng(3)
    chat = Chat(TALKERS["fused"], OPTIONS, rng, system)  # type: ignore[arg-type]
    for message in ("abc", "x"):
        list(chat.send(message))
    assert chat.save(tmp_path / "chat.json") == len(json.loads((tmp_path / "chat.json").read_text()))
    other = Chat(TALKERS["fused"], OPTIONS, Rng(3), "sys")  # type: ignore[arg-type]
    list(other.send("zz"))
    assert other.load(tmp_path / "chat.json") == 4 + (system is not None)
    assert (other.system, other.messages) == (system, chat.messages)
    other._rng.state = rng.state
    assert list(other.send("c")) == list(chat.send("c"))
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


ASKED, ANSWERED = ({"role": role, "content": "a"} for role in ("user", "assistant"))
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a saved chat; give a JSON list of messages such as"),
        (json.dumps({"messages": [ASKED, ANSWERED]}), "is not a saved chat"),
        (json.dumps([["user", "a"]]), "is not a saved chat"),
        (json.dumps([{"role": "user", "content": None}, ANSWERED]), "is not a saved chat"),
        (json.dumps([{"role": "user", "content": "\ud800"}, ANSWERED]), "is not a saved chat"),
        (
            json.dumps([ASKED, ANSWERED, ANSWERED]),
            "message 3 of .* is from assistant; give user and assistant in turns",
        ),
        (json.dumps([SYSTEM, ANSWERED]), "message 2 of .* is from assistant"),
        (json.dumps([ASKED, ANSWERED, SYSTEM]), "message 3 of .* is from system"),
        (json.dumps([ASKED]), "the last message of .* has no answer; add one, or leave the message out"),
        (json.dumps([SYSTEM]), "the chat template supports no system message"),
        (None, r"cannot be read \(No such file or directory\); give a file that a chat was saved to"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    if content is not None:
        path.write_text(content)
    chat = Chat(TALKERS["fused"], OPTIONS, Rng(0), template=replace(TEMPLATE, system=None))  # type: ignore[arg-type]
    list(chat.send("abc"))
    before = list(chat.messages)
    with pytest.raises(InputError, match=message):
        chat.load(path)
    assert chat.messages == before


def test_a_conversation_that_cannot_be_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    chat = Chat(TALKERS["fused"], OPTIONS, Rng(0))  # type: ignore[arg-type]
    for path, problem in ((Path("/proc/absent/chat.json"), r"cannot be written \(.*\)"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=problem):
            chat.save(path)
    assert list(tmp_path.iterdir()) == []
