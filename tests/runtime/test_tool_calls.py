"""Tests tool calls in generated text: read piece by piece, written, and as a grammar."""

import itertools
import json
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preproc.tokenizer import HuggingFaceTokenizer, Tokenizer
from runtime.serving.tool_calls import GRANITE, HERMES, LLAMA3, MISTRAL, Call, CallReader, Form, call_rules, form_of
from runtime.text.constraint import Constraint, rules
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.preproc.test_tokenizer import byte_level
from tests.runtime.test_constraint import TOKENIZERS
from tests.support.prescribed import Prescribed
from tests.support.tool_templates import WITH_TOOLS

NAMES = ["f", "g"]
F = '{"name": "f", "arguments": {"a": 1}}'
G = '{"name": "g", "arguments": {}}'
CALLS = [Call("f", '{"a": 1}'), Call("g", "{}")]
ODD = '{"name": "f", "arguments": {"a": "</tool_call> {"}}'

READ: list[tuple[Form, str, str, list[Call]]] = [
    (HERMES, f"<tool_call>\n{F}\n</tool_call>", "", CALLS[:1]),
    (HERMES, f"<tool_call>\n{F}\n</tool_call>\n<tool_call>{G}</tool_call>\n", "", CALLS),
    (HERMES, f"I ask. \n\n<tool_call>\n{F}\n</tool_call>", "I ask.", CALLS[:1]),
    (HERMES, f"<tool_call>\n{F}\n</tool_call> Done.", " Done.", CALLS[:1]),
    (HERMES, f"<tool_call>\n{F}", "", CALLS[:1]),
    (HERMES, f"<tool_call>{ODD}</tool_call>", "", [Call("f", '{"a": "</tool_call> {"}')]),
    (HERMES, '<tool_call>{"name": "x y", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [Call("x y", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "parameters": {"a":\n"\n"}}</tool_call>', "", [Call("f", '{"a": "\\n"}')]),
    (LLAMA3, ' {"name": "f", "parameters": {"a": 1}}', "", CALLS[:1]),
    (LLAMA3, f'<|python_tag|>{{"name": "f", "parameters": {{"a": 1}}}}; {G}', "", CALLS),
    (LLAMA3, 'So: <|python_tag|>{"name": "other", "parameters": {}}', "So:", [Call("other", "{}")]),
    (MISTRAL, f"[TOOL_CALLS] [{F}, {G}]", "", CALLS),
    (MISTRAL, f"Well.[TOOL_CALLS][{F}] Bye.", "Well.Bye.", CALLS[:1]),
    (GRANITE, f"<|tool_call|>[{F}, {G}]", "", CALLS),
    (GRANITE, f"<|tool_call|>{F}<|/tool_call|>", "", CALLS[:1]),
]
PLAIN: list[tuple[Form, str]] = [
    (HERMES, " a <tool_ box>\n\n "),
    (HERMES, "<tool_call>{broken</tool_call> and more"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": </tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "open'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>'),
    (HERMES, f"<tool_call>{'[' * 100000}</tool_call>"),
    (HERMES, '<tool_call>{"name": 3}</tool_call><tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, F),
    (HERMES, "<tool_call></tool_call>"),
    (LLAMA3, '{"name": "Bob", "parameters": {}}'),
    (LLAMA3, '{"answer": 42}'),
    (LLAMA3, '<|python_tag|>search.call(query="x")'),
    (LLAMA3, '  {"name": "f", "parameters": {"a": 1'),
    (MISTRAL, "[TOOL_CALLS] none"),
    (MISTRAL, "a [TOOL_"),
    (GRANITE, "<|tool_call|>[1]"),
]


def read(form: Form, pieces: list[str]) -> tuple[str, list[Call]]:
    """Returns the content and the calls that a reader finds in all pieces."""
    reader = CallReader(form, NAMES)
    found = [each for piece in pieces for each in reader.add(piece)] + reader.finish()
    texts = [each for each in found if isinstance(each, str)]
    assert all(texts)
    return "".join(texts), [each for each in found if isinstance(each, Call)]


@pytest.mark.parametrize(("form", "text", "content", "calls"), READ)
def test_calls_are_read_however_the_text_is_cut(form: Form, text: str, content: str, calls: list[Call]) -> None:
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls)
    for i in range(len(text)):
        assert read(form, [text[:i], text[i:]]) == (content, calls)


@pytest.mark.parametrize(("form", "text"), PLAIN)
def test_invalid_calls_stay_text_however_they_are_cut(form: Form, text: str) -> None:
    assert read(form, [text]) == (text, [])
    for i in {*range(min(len(text), 60)), len(text) - 3}:
        assert read(form, [text[:i], text[i:]]) == (text, [])


ANY = st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "{", F, G, '"', " ", "\n", "a", "<"]))


@given(st.sampled_from([HERMES, LLAMA3, MISTRAL, GRANITE]), ANY)
def test_reading_does_not_depend_on_how_the_text_is_cut(form: Form, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert read(form, pieces) == read(form, [text]) == read(form, list(text))


def test_text_that_cannot_begin_a_call_is_returned_at_once() -> None:
    reader = CallReader(HERMES, NAMES)
    assert reader.add("Hello ") == ["Hello"]
    assert reader.add("<tool") == []
    assert reader.add("box>") == [" <toolbox>"]
    assert reader.add(f"<tool_call>{F}</tool_call>") == CALLS[:1]
    assert reader.add("<tool_call>") == []
    assert reader.finish() == ["<tool_call>"]


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL, GRANITE])
def test_written_calls_are_read_again(form: Form) -> None:
    written = form.render([("f", {"a": 1}), ("g", {})])
    assert read(form, list(written)) == ("", CALLS)


def test_the_form_follows_from_the_template() -> None:
    assert [form_of(public.source) for public in WITH_TOOLS.values()] == [HERMES, LLAMA3, MISTRAL]
    assert form_of("respond only with <|tool_call|> followed by a JSON list") is GRANITE
    assert form_of("{{ tools }}") is HERMES


def test_ids_have_the_length_that_the_template_requires() -> None:
    assert len({HERMES.new_id() for _ in range(9)}) == 9
    assert HERMES.new_id().startswith("call_")
    assert all(len(MISTRAL.new_id()) == 9 and MISTRAL.new_id().isalnum() for _ in range(9))


FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": 'the "first"',
        "parameters": {
            "type": "object",
            "$defs": {"Count": {"type": "integer", "minimum": 0, "maximum": 99}},
            "properties": {"count": {"$ref": "#/$defs/Count"}, "kind": {"enum": ["é", "b"]}},
            "required": ["count", "kind"],
            "additionalProperties": False,
        },
    },
    {"name": "second", "parameters": None},
]


def with_tokens(form: Form) -> HuggingFaceTokenizer:
    """Returns a tokenizer with special tokens for the form's opening and closing marks."""
    model = byte_level()
    model.add_special_tokens([text for text in (form.opening, form.closing) if text])
    return HuggingFaceTokenizer(model.to_str().encode())


def generated_call(form: Form, tokenizer: Tokenizer, seed: int, several: bool) -> str:
    """Generates a required call from random logits."""
    stop_ids = tokenizer.stop_ids or (0,)
    grammar = rules("start: calls\n" + call_rules(form, FUNCTIONS, several, tokenizer.specials))
    constraint = Constraint(grammar, tokenizer, stop_ids, tokenizer.vocab_size, [3])
    shown_ids = form.shown_ids(tokenizer.specials)
    options = GenerationOptions(SamplingOptions(temperature=1.0), 900, stop_ids, shown_ids=shown_ids)
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokenizer.vocab_size, generator=generator) for _ in itertools.count())
    steps = list(generate(Prescribed(logits, 1000), [3], options, Rng(seed), tokenizer, constraint))  # type: ignore[arg-type]
    assert steps[-1].finish_reason == "stop"
    return "".join(step.text for step in steps)


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL, GRANITE])
@pytest.mark.parametrize("kind", ["special tokens", *TOKENIZERS])
def test_the_grammar_gives_only_valid_calls(form: Form, kind: str) -> None:
    tokenizer = with_tokens(form) if kind == "special tokens" else TOKENIZERS[kind]
    names, counts = [function["name"] for function in FUNCTIONS], set()
    for seed, several in itertools.product(range(16), (False, True)):
        reader = CallReader(form, names)
        calls = [*reader.add(generated_call(form, tokenizer, seed, several)), *reader.finish()]
        for call in calls:
            assert isinstance(call, Call)
            if call.name == names[1]:
                assert call.arguments == "{}"
            else:
                jsonschema.validate(json.loads(call.arguments), FUNCTIONS[0]["parameters"])
        counts.add((several, min(len(calls), 2)))
    assert (False, 1) in counts
    assert (False, 2) not in counts
    assert ((True, 2) in counts) == (form is not LLAMA3)
