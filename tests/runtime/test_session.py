import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.errors import InputError
from model.model import Llama
from runtime.engine.program import Program
from runtime.engine.session import SINKS, Session, Steps, common
from runtime.pte.metadata import MethodSpec
from tests.conftest import TOY, toy_model
from tests.support.kinds import (
    CHUNK,
    CONTEXT,
    FUSED,
    KINDS,
    PLAIN,
    VOCABULARY,
    WINDOW,
    EagerSteps,
    Kind,
    export_kind,
    recomputed,
)


def operations(vocabulary: int, longest: int) -> st.SearchStrategy[list[tuple[str, list[int]]]]:
    """Returns a strategy of operations on a session, each with the tokens to append, or a list as long as the tokens to
    rewind.
    """
    tokens = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=longest)
    forgotten = st.lists(st.just(0), max_size=longest)
    steps = st.one_of(
        st.tuples(st.just("prefill"), tokens),
        st.tuples(st.just("rewind"), st.one_of(forgotten, st.just([0]))),
        st.tuples(st.sampled_from(["reset", "fork", "keep"]), st.just([])),
        st.tuples(st.sampled_from(["restart", "rows"]), tokens),
    )
    return st.lists(steps, min_size=1, max_size=8)


class Player:
    """Applies the same operations to a session and to a list of tokens, and compares with results computed from
    scratch.
    """

    def __init__(self, program: Steps, model: Llama, tolerance: float = 1e-3) -> None:
        self._tolerance = tolerance
        self._program = program
        self.session = Session(program)
        self.text = list[int]()
        self._model = model
        self._ring = min((buffer.shape[1] for buffer in self.session.cache.buffers.values()), default=CONTEXT)
        self._furthest = 0  # largest length of the text since it was last empty

    def play(self, operation: str, argument: list[int]) -> None:
        """Applies an operation, or checks that it is refused."""
        if operation == "reset":
            self.session.reset()
            self.text, self._furthest = [], 0
        elif operation == "rewind":
            self._rewind(max(len(self.text) - len(argument), 0))
        elif operation == "fork":
            self.session = self.session.fork()
        elif operation == "keep":
            self._keep()
        elif operation == "restart" and len(argument) <= CONTEXT:
            self._restart(argument)
        elif len(self.text) + len(argument) <= self.session.capacity:
            self._prefill(argument, len(argument) if operation == "rows" else 1)
        else:
            with pytest.raises(InputError, match=f"has {len(argument)} tokens"):
                self.session.prefill(argument)
        assert self.session.position == len(self.text)
        assert self.session.tokens == self.text

    def _rewind(self, position: int) -> None:
        if position == 0 or max(position - self._ring + 1, 0) >= self._furthest - self._ring:
            self.session.rewind(position)
            del self.text[position:]
            self._furthest = self._furthest if position else 0
        else:
            with pytest.raises(InputError, match=f"rewind to position {position}: .* has been overwritten"):
                self.session.rewind(position)

    def _keep(self) -> None:
        """Saves the session and continues in another one that loads it."""
        with tempfile.TemporaryDirectory() as folder:
            self.session.save(Path(folder) / "session")
            self.session = Session(self._program)
            if self.text:
                self.session.prefill(self.text[:1])
            self.session.load(Path(folder) / "session")

    def _restart(self, tokens: list[int]) -> None:
        """Restarts with a text whose first half is the old text's."""
        text = (self.text[: len(tokens) // 2] + tokens)[:CONTEXT]
        found, before = self.session.restart(text), common(self.text, text[:-1])
        refused = before and max(before - self._ring + 1, 0) < self._furthest - self._ring
        self._furthest = len(text) if refused or not before else max(self._furthest, len(text))
        self.text = text
        torch.testing.assert_close(found, recomputed(self._model, text)[0][-1], atol=self._tolerance, rtol=1e-4)

    def _prefill(self, tokens: list[int], rows: int = 1) -> None:
        self.text += tokens
        self._furthest = max(self._furthest, len(self.text))
        found = self.session.extend(tokens, rows)
        logits, hidden = recomputed(self._model, self.text)
        torch.testing.assert_close(found, logits[-rows:], atol=self._tolerance, rtol=1e-4)
        if self.session.hidden is not None:
            torch.testing.assert_close(self.session.hidden, hidden[-len(tokens) :], atol=self._tolerance, rtol=1e-4)


@settings(max_examples=15)
@given(operations=operations(TOY.vocab_size, 20))
def test_any_order_of_operations_gives_what_recomputing_from_scratch_gives(
    toy_program: Program, operations: list[tuple[str, list[int]]]
) -> None:
    player = Player(toy_program, toy_model())
    for operation in operations:
        player.play(*operation)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=10)
@given(operations=operations(VOCABULARY, 25))
def test_any_order_of_operations_works_with_models_of_every_kind(
    name: str, operations: list[tuple[str, list[int]]]
) -> None:
    program = EagerSteps(KINDS[name])
    player = Player(program, program.model, KINDS[name].tolerance)
    for operation in operations:
        player.play(*operation)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [1, 6, 7, 8, 30])
def test_the_whole_context_can_be_decoded(name: str, length: int) -> None:
    """Fills the context token by token, through several windows."""
    program = EagerSteps(KINDS[name])
    player = Player(program, program.model, KINDS[name].tolerance)
    tokens = [7 * i % VOCABULARY for i in range(CONTEXT)]
    player.play("prefill", tokens[:length])
    for token in tokens[length:]:
        player.play("prefill", [token])
    assert player.text == tokens


def test_a_thousand_decoded_tokens_agree_with_recomputing_at_every_position(tmp_path: Path) -> None:
    """Runs an exported file, whose attention operator reads only the filled part of the caches."""
    kind = Kind(replace(PLAIN, context=1024), replace(FUSED, max_seq_len=1024))
    export_kind(kind, tmp_path / "long.pte", "xnnpack")
    session, tokens = Session(Program(tmp_path / "long.pte")), [31 * i * i % VOCABULARY for i in range(1000)]
    found = torch.stack([session.decode(token) for token in tokens])
    torch.testing.assert_close(found, recomputed(kind.model, tokens)[0], atol=1e-3, rtol=1e-4)


def one_layer(kind: Kind) -> Kind:
    """Returns a kind with the first block only, whose cache rows depend on nothing but a token and its position."""
    config = kind.config
    layers = {name: tuple(i for i in getattr(config, name) if i == 0) for name in ("local_layers", "nope_layers")}
    return replace(kind, config=replace(config, n_layers=1, **layers))


@pytest.mark.parametrize("name", KINDS)
def test_after_sliding_logits_are_those_of_the_shorter_text(name: str) -> None:
    kind = one_layer(KINDS[name])
    session, fresh = Session(program := EagerSteps(kind)), 0
    if kind.config.positions == "learned" and kind.options.kv_cache:
        session.prefill([1] * CONTEXT)
        with pytest.raises(InputError, match="learned positions"):
            session.slide()
        return
    for _ in range(4):
        while session.position < session.capacity:
            found, fresh = session.decode(fresh * fresh % VOCABULARY), fresh + 1
        expected, _ = recomputed(program.model, session.tokens)
        torch.testing.assert_close(found, expected[-1], atol=4 * kind.tolerance, rtol=1e-3)
        text = list(session.tokens)
        count = session.slide()
        assert session.tokens == text[:SINKS] + text[SINKS + count :]
        assert session.position == len(session.tokens)


def test_a_text_of_ten_contexts_slides_in_constant_memory(toy_program: Program) -> None:
    session, slides = Session(toy_program), 0
    places = [buffer.data_ptr() for buffer in session.cache.buffers.values()]
    for number in range(10 * TOY.context):
        if session.position == session.capacity:
            session.slide()
            slides += 1
        assert torch.isfinite(session.decode(number % TOY.vocab_size)).all()
    assert places == [buffer.data_ptr() for buffer in session.cache.buffers.values()]
    assert slides <= 10 * TOY.context / ((TOY.context - SINKS) // 2)


def test_a_window_as_long_as_the_context_cannot_slide() -> None:
    session = Session(EagerSteps(Kind(replace(WINDOW, sliding_window=CONTEXT - 3))))
    session.prefill([1] * CONTEXT)
    with pytest.raises(InputError, match=f"none of the {CONTEXT} tokens can be forgotten"):
        session.slide()


@pytest.mark.parametrize("name", ["window", "fused", "fused, int8 in a window", "no cache"])
def test_only_accepted_proposals_are_kept(name: str) -> None:
    program = EagerSteps(KINDS[name])
    session, text = Session(program), [5, 9, 2, 8, 3, 1, 7, 4]
    session.prefill(text)
    guess = [11, 12, 13][: session.max_proposed]
    assert session.max_proposed == (3 if "fused" in name else 1)
    logits = session.propose(guess)
    expected, _ = recomputed(program.model, text + guess)
    torch.testing.assert_close(logits, expected[len(text) :], atol=KINDS[name].tolerance, rtol=1e-3)
    session.accept(1)
    assert session.tokens == [*text, 11]
    expected, _ = recomputed(program.model, [*text, 11, 3])
    torch.testing.assert_close(session.decode(3), expected[-1], atol=KINDS[name].tolerance, rtol=1e-3)


def saved(tmp_path: Path, program: Steps) -> Path:
    session = Session(program)
    session.prefill([3, 1, 4, 1, 5])
    session.save(tmp_path / "session")
    return tmp_path / "session"


@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_session_is_refused_and_changes_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = EagerSteps(KINDS["fused"])
    path = saved(tmp_path_factory.mktemp("session"), program)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    session = Session(program)
    session.prefill([2, 7])
    with pytest.raises(InputError, match=r"give|again"):
        session.load(path)
    assert session.tokens == [2, 7]
    torch.testing.assert_close(session.decode(1), recomputed(program.model, [2, 7, 1])[0][-1], atol=1e-3, rtol=1e-4)


def test_another_models_session_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, EagerSteps(KINDS["fused"]))
    with pytest.raises(InputError, match="was saved with another model; give the"):
        Session(EagerSteps(KINDS["window"])).load(path)
    with pytest.raises(InputError, match="cannot be written"):
        Session(EagerSteps(KINDS["fused"])).save("/proc/absent/session")
    with pytest.raises(InputError, match="cannot be read"):
        Session(EagerSteps(KINDS["fused"])).load(tmp_path / "absent")
    assert [file.name for file in tmp_path.iterdir()] == ["session"]


@pytest.mark.parametrize("kind", ["fused", "window", "fused, window of one", "no cache"])
def test_begin_runs_all_steps_of_a_prompt_but_the_last(kind: str) -> None:
    text = [1 + i % (VOCABULARY - 1) for i in range(2 * CHUNK + 3)]
    steps = EagerSteps(KINDS[kind])
    session, expected = Session(steps), Session(steps).prefill(text)
    session.prefill([text[0], 0])
    done = list(session.begin(text))
    chunk = session.chunk
    assert done == [(position, len(text)) for position in range(1 + chunk, len(text), chunk)]
    assert session.tokens == text[: session.position]
    assert 0 < len(text) - session.position <= chunk
    torch.testing.assert_close(session.restart(text), expected, rtol=0, atol=KINDS[kind].tolerance)


def test_begin_refuses_a_prompt_that_is_too_long_before_the_first_step() -> None:
    session = Session(EagerSteps(KINDS["fused"]))
    with pytest.raises(InputError, match=f"only {CONTEXT} of {CONTEXT} positions are free"):
        next(session.begin([1] * (CONTEXT + 1)))
    assert session.position == 0


def test_restart_runs_only_tokens_that_differ() -> None:
    program = Watched(KINDS["fused"])
    session = Session(program)
    session.prefill([1, 2, 3, 4, 5])
    session.restart([1, 2, 3, 9])
    assert program.given == [9]
    session.restart([1, 2, 3])
    assert program.given == [3]


def test_a_window_can_be_rewound_by_one_and_to_the_start() -> None:
    session = Session(EagerSteps(KINDS["window"]))
    session.prefill([1] * 20)
    session.rewind(19)
    with pytest.raises(InputError, match="cannot rewind to position 18: the model sees 6 positions at a time"):
        session.rewind(18)
    assert session.position == 19
    session.reset()
    session.prefill([1] * 5)
    session.rewind(2)


def test_hidden_states_are_those_of_the_latest_step_or_none() -> None:
    session = Session(EagerSteps(KINDS["alibi"]))
    assert session.hidden is None
    session.prefill([3] * 17)
    assert session.hidden is not None
    assert session.hidden.shape == (17, KINDS["alibi"].config.dim)
    kept = session.hidden.clone()
    first = session.hidden
    session.decode(5)
    assert session.hidden.shape == (1, KINDS["alibi"].config.dim)
    assert torch.equal(first, kept)
    without = Session(EagerSteps(KINDS["no cache, learned positions"]))
    without.prefill([3])
    assert without.hidden is None


class Watched(EagerSteps):
    """Records the tokens of each step, and fails if `fails` is set."""

    fails = False
    given: list[int]

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.given = inputs["tokens"][0].tolist()
        if self.fails:
            raise RuntimeError("it failed")
        return super().step(method, inputs)


@pytest.mark.parametrize("name", ["window", "fused", "no cache"])
def test_a_failed_step_leaves_the_session_unchanged(name: str) -> None:
    program = Watched(KINDS[name])
    player = Player(program, program.model)
    player.play("prefill", [1, 2, 3])
    program.fails = True
    with pytest.raises(RuntimeError):
        player.session.prefill([4, 5])
    assert player.session.hidden is None
    program.fails = False
    player.play("prefill", [6])


def test_steps_are_padded_with_zeros() -> None:
    program = Watched(KINDS["window"])
    session = Session(program)
    session.prefill([9] * CHUNK)
    session.prefill([3, 4])
    assert program.given == [3, 4] + [0] * (CHUNK - 2)
    program = Watched(KINDS["no cache"])
    session = Session(program)
    session.prefill([9] * 20)
    session.rewind(1)
    session.decode(4)
    assert program.given == [9, 4] + [0] * (CONTEXT - 2)


def test_interleaved_sessions_of_one_program_are_independent(toy_program: Program) -> None:
    texts = [[1, 5, 9, 13], [2, 4, 6, 8, 10, 12, 14, 16, 18]]
    alone = [Session(toy_program).prefill(text) for text in texts]
    first, second = Session(toy_program), Session(toy_program)
    rows = []
    for i in range(9):
        if i < 4:
            rows = [first.decode(texts[0][i])]
        last = second.decode(texts[1][i])
    torch.testing.assert_close(rows[0], alone[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(last, alone[1], atol=1e-3, rtol=1e-4)


def test_logits_outlive_the_next_step(toy_program: Program) -> None:
    session = Session(toy_program)
    logits = session.decode(5)
    kept = logits.clone()
    session.decode(900)
    assert torch.equal(logits, kept)


def test_an_invalid_prompt_is_refused_and_changes_nothing(toy_program: Program) -> None:
    session = Session(toy_program)
    session.prefill([1, 2, 3])
    for tokens, message in (
        ([], "the prompt is empty"),
        ([TOY.vocab_size], f"token {TOY.vocab_size} is not in the vocabulary; give ids from 0 to {TOY.vocab_size - 1}"),
        ([5, -1], "token -1"),
        ([7] * 46, "has 46 tokens, but only 45 of 48 positions are free"),
    ):
        with pytest.raises(InputError, match=message):
            session.prefill(tokens)
        assert session.position == 3
