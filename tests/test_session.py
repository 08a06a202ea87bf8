import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.verify import reference
from model.errors import InputError
from runtime.program import Program
from runtime.session import Session
from tests.conftest import TOY, toy_model

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.lists(st.integers(0, TOY.vocab_size - 1), min_size=1, max_size=20)),
        st.tuples(st.just("rewind"), st.lists(st.just(0), max_size=25)),
        st.tuples(st.just("reset"), st.just([])),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(operations=OPERATIONS)
def test_any_order_of_operations_gives_what_recomputing_from_scratch_gives(
    toy_program: Program, operations: list[tuple[str, list[int]]]
) -> None:
    session, text, model = Session(toy_program), list[int](), toy_model()
    for operation, argument in operations:
        if operation == "reset":
            session.reset()
            text = []
        elif operation == "rewind":
            text = text[: max(len(text) - len(argument), 0)]
            session.cache.rewind(len(text))
        elif len(text) + len(argument) <= TOY.context:
            text += argument
            logits = session.prefill(argument)
            torch.testing.assert_close(logits, reference(model, text)[-1], atol=1e-3, rtol=1e-4)
        else:
            with pytest.raises(InputError, match=f"has {len(argument)} tokens"):
                session.prefill(argument)
        assert session.position == len(text)


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


def test_a_prompt_that_cannot_be_is_refused_and_changes_nothing(toy_program: Program) -> None:
    session = Session(toy_program)
    session.prefill([1, 2, 3])
    for tokens, message in (
        ([], "the prompt is empty"),
        ([TOY.vocab_size], f"token {TOY.vocab_size} is not in the vocabulary; ids run from 0 to {TOY.vocab_size - 1}"),
        ([5, -1], "token -1"),
        ([7] * 46, "has 46 tokens, but only 45 of 48 positions are free"),
    ):
        with pytest.raises(InputError, match=message):
            session.prefill(tokens)
        assert session.position == 3
