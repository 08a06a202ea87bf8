from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from runtime.engine.batched_session import BatchedSession
from runtime.engine.session import Session
from tests.support.kinds import CHUNK, CONTEXT, FUSED, KINDS, VOCABULARY, EagerSteps, Kind, recomputed

LANES = 3
BATCHES = {
    name: replace(kind, options=replace(kind.options, batch_size=LANES))
    for name, kind in KINDS.items()
    if kind.options.attention == "fused"
}
TEXT = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.dictionaries(st.integers(0, LANES - 1), TEXT, min_size=1)),
        st.tuples(st.just("reset"), st.integers(0, LANES - 1)),
    ),
    max_size=12,
)


@pytest.mark.parametrize("name", BATCHES)
@settings(max_examples=8)
@given(steps=STEPS)
def test_each_lane_equals_a_single_session(name: str, steps: list[tuple[str, object]]) -> None:
    program = EagerSteps(BATCHES[name])
    session, texts = BatchedSession(program), [list[int]() for _ in range(LANES)]
    for _, argument in steps:
        if isinstance(argument, int):
            session.reset(argument)
            texts[argument] = []
            continue
        assert isinstance(argument, dict)
        given = {lane: tokens[: session.chunk] for lane, tokens in argument.items() if len(texts[lane]) < CONTEXT - 7}
        for lane, logits in (session.step(given) if given else {}).items():
            texts[lane] += given[lane]
            expected, _ = recomputed(program.model, texts[lane])
            torch.testing.assert_close(logits, expected[-1], atol=BATCHES[name].tolerance, rtol=1e-3)
    assert [cache.position for cache in session.caches] == [len(text) for text in texts]


def test_tokens_that_do_not_fit_are_refused_before_a_step() -> None:
    session = BatchedSession(EagerSteps(BATCHES["fused"]))
    for _ in range(CONTEXT // CHUNK):
        session.step({1: [1] * CHUNK})
    with pytest.raises(
        InputError, match=f"has {CHUNK} tokens, but only {CONTEXT - 35} of {CONTEXT} positions are free"
    ):
        session.step({0: [1], 1: [1] * CHUNK})
    with pytest.raises(InputError, match="the prompt is empty"):
        session.step({2: []})
    assert [cache.position for cache in session.caches] == [0, 35, 0]


def test_a_session_refuses_a_file_for_several_texts() -> None:
    with pytest.raises(InputError, match="exported for 3 texts at once; use `llama-pte batch`"):
        Session(EagerSteps(BATCHES["fused"]))
    one = BatchedSession(EagerSteps(Kind(KINDS["fused"].config, FUSED)))
    assert len(one) == 1
