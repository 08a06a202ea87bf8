from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng, SamplingOptions
from runtime.text.speculative import Draft, Drafter, Lookup
from tests.support.kinds import KINDS, VOCABULARY, EagerSteps

FUSED_KINDS = [name for name, kind in KINDS.items() if kind.options.max_rows > 1 and kind.kv_dtype == "float32"]


def test_lookup_finds_what_followed_the_longest_matching_suffix() -> None:
    lookup = Lookup()
    assert lookup.guess([1, 2, 3, 7, 8, 9, 2, 3, 5, 1, 2, 3], 3) == [7, 8, 9]
    assert lookup.guess([1, 2, 3, 4, 9, 3], 8) == [4, 9, 3]
    assert lookup.guess([4, 4], 8) == [4]
    assert lookup.guess([1, 2, 3], 8) == []
    assert lookup.guess([5], 8) == []
    assert lookup.guess([1, 2, 1], 0) == []


class Certain:
    """A drafter that knows the text but proposes a wrong token at every `wrong`-th position."""

    def __init__(self, text: Sequence[int], wrong: int) -> None:
        self.text, self.wrong, self.calls = list(text), wrong, 0

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        self.calls += 1
        following = self.text[len(text) : len(text) + count]
        return [(t + 1) % VOCABULARY if (len(text) + i) % self.wrong == 0 else t for i, t in enumerate(following)]


@pytest.mark.parametrize("name", FUSED_KINDS)
@settings(max_examples=8)
@given(
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
    temperature=st.sampled_from([0.0, 1.0]),
    wrong=st.integers(2, 9),
)
def test_a_guess_changes_nothing_but_the_number_of_steps(
    name: str, prompt: list[int], temperature: float, wrong: int
) -> None:
    """Generates to the end of the context, with right and wrong guesses; each coin must be drawn for the same token."""
    program = EagerSteps(KINDS[name])

    def text(drafter: Drafter | None) -> list[int]:
        options = GenerationOptions(SamplingOptions(temperature), drafter=drafter)
        return [step.token for step in generate(Session(program), prompt, options, Rng(3))]

    expected = text(None)
    knowing = Certain(prompt + expected, wrong)
    assert text(knowing) == expected
    assert text(Lookup()) == expected
    if len(expected) > 10 and wrong > 4:
        assert knowing.calls < 0.7 * len(expected)


def test_a_draft_model_proposes_its_most_likely_tokens(toy_program: Program) -> None:
    options, vocab_size = GenerationOptions(max_new_tokens=30), toy_program.metadata.config.vocab_size
    expected = [step.token for step in generate(Session(toy_program), [1, 5, 9], options, Rng(0))]
    draft = Draft(toy_program, vocab_size)
    assert draft.guess([1, 5, 9], 3) == expected[:3]
    assert draft.guess([1, 5, 9, expected[0]], 2) == expected[1:3]
    assert draft.guess([1] * 47, 3) == [], "its context has no room"
    found = generate(Session(toy_program), [1, 5, 9], replace(options, drafter=Draft(toy_program, vocab_size)), Rng(0))
    assert [step.token for step in found] == expected
    with pytest.raises(InputError, match=f"the draft model has {vocab_size} ids, but the model has 7"):
        Draft(toy_program, 7)
