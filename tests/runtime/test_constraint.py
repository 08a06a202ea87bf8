import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from export.checkpoints.layouts import BUILT_IN
from model.errors import InputError
from preproc.tokenizer import HuggingFaceTokenizer, Tokenizer, decode, open_tokenizer
from runtime import generate as command
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.constraint import Constraint, json_schema, regex
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng, SamplingOptions
from tests.preproc.test_tokenizer import BYTE_FALLBACK, BYTE_LEVEL
from tests.support.prescribed import Prescribed

SCHEMAS: dict[str, Any] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tame": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["a red ball", "dog", 17, None, {"big": [True]}]},
    "nested arrays": {
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": {"type": "array", "maxItems": 2, "items": {"enum": ["x", "\N{SNOWMAN}"]}},
    },
    "integer in bounds": {"type": "integer", "minimum": -12, "maximum": 1234},
}
REGEXES = [
    "yes|no",
    r"[A-Z][a-z]{1,8}( [a-z]{1,8}){2}\.",
    "[0-9]{3}-[0-9]{4}",
    "(\N{SNOWMAN}|é){2,4}",
    r" [a-z]{2,6}",
    r"[^a]{0,5}",
]
TOKENIZERS = {
    "sentencepiece": open_tokenizer(BUILT_IN / "tokenizer.model"),
    "tiktoken": open_tokenizer(Path(__file__).parents[1] / "cpp" / "fuzz_ranks.tiktoken"),
    "byte level": HuggingFaceTokenizer(BYTE_LEVEL.to_str().encode()),
    "byte fallback": HuggingFaceTokenizer(BYTE_FALLBACK.to_str().encode()),
}


def schema_file(folder: Path, schema: Any) -> Path:
    path = folder / "schema.json"
    path.write_text(json.dumps(schema))
    return path


def generated(program: Program, grammar: str, seed: int, prompt: str = "Once upon a time") -> str:
    """Generates a whole text that follows a grammar."""
    metadata, tokens = program.metadata, [1, *program.tokenizer.encode(prompt)]
    options = GenerationOptions(SamplingOptions(temperature=1.0), stop_ids=metadata.stop_ids)
    constraint = Constraint(grammar, program.tokenizer, metadata.stop_ids, metadata.config.vocab_size, tokens)
    steps = list(generate(Session(program), tokens, options, Rng(seed), program.tokenizer, constraint))
    assert steps[-1].finish_reason == "stop"
    return "".join(step.text for step in steps)


def generated_at_random(tokenizer: Tokenizer, grammar: str, seed: int, padding: int = 0) -> str:
    """Generates a text from random logits, with `padding` ids beyond the tokenizer's vocabulary."""
    vocab_size, stop_ids = tokenizer.vocab_size + padding, tokenizer.stop_ids or (0,)
    options = GenerationOptions(SamplingOptions(temperature=1.0), 400, stop_ids)
    constraint = Constraint(grammar, tokenizer, stop_ids, vocab_size, [0])
    generator = torch.Generator().manual_seed(seed)
    session = Prescribed((torch.randn(vocab_size, generator=generator) for _ in itertools.count()), capacity=1000)
    steps = list(generate(session, [0], options, Rng(seed), tokenizer, constraint))
    assert steps[-1].finish_reason == "stop"
    assert not padding or max(step.token for step in steps) < tokenizer.vocab_size
    return "".join(step.text for step in steps)


@pytest.fixture(scope="module")
def program(tiny_pte: Path) -> Program:
    return Program(tiny_pte)


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_always_parses_and_follows_its_schema(name: str, program: Program, tmp_path: Path) -> None:
    grammar = json_schema(schema_file(tmp_path, SCHEMAS[name]))
    for seed in range(6):
        jsonschema.validate(json.loads(generated(program, grammar, seed)), SCHEMAS[name])


@pytest.mark.parametrize("pattern", REGEXES)
def test_text_always_matches_its_regular_expression(pattern: str, program: Program) -> None:
    for seed in range(6):
        assert re.fullmatch(pattern, generated(program, regex(pattern), seed))
        assert re.fullmatch(pattern, generated(program, regex(pattern), seed, prompt=""))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_kind_of_tokenizer_follows_the_grammar(kind: str, tmp_path: Path) -> None:
    tokenizer, texts = TOKENIZERS[kind], set()
    for seed in range(3):
        for schema in SCHEMAS.values():
            text = generated_at_random(tokenizer, json_schema(schema_file(tmp_path, schema)), seed, padding=7)
            jsonschema.validate(json.loads(text), schema)
            texts.add(text)
        for pattern in REGEXES:
            texts.add(text := generated_at_random(tokenizer, regex(pattern), seed))
            assert re.fullmatch(pattern, text)
    assert len(texts) > len(SCHEMAS) + len(REGEXES)


def test_only_a_complete_text_allows_stop_tokens() -> None:
    tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    constraint = Constraint(regex("ab?"), tokenizer, (2, 9), tokenizer.vocab_size, [1])
    for letter, allowed in (("", {"a", "ab"}), ("a", {"b", ""}), ("b", {""})):
        if letter:
            constraint.take(next(i for i in range(300, 2048) if tokenizer.piece(i, first=False) == letter.encode()))
        ids = np.flatnonzero(constraint.allowed()).tolist()
        assert {tokenizer.piece(i, first=False).decode() for i in ids if i not in (2, 9)} <= allowed - {""}
        assert {i for i in ids if i in (2, 9)} == ({2, 9} if "" in allowed else set())


def test_the_command_generates_json(tiny_pte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = schema_file(tmp_path, SCHEMAS["object"])
    assert command.main([str(tiny_pte), "--json-schema", str(schema), "--temperature", "1", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finish_reason"] == "stop"
    jsonschema.validate(json.loads(result["text"]), SCHEMAS["object"])
    assert command.main([str(tiny_pte), "--regex", "(cat|dog)!"]) == 0
    assert capsys.readouterr().out in ("cat!", "dog!")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"type": ', "is not a valid JSON schema"),
        ("\udcff", "is not a valid JSON schema"),
        ("[1]", "is not a valid JSON schema"),
        ('{"type": "objekt"}', "the grammar cannot be used .Invalid type: objekt.; simplify or correct it"),
        ('{"not": {"type": "string"}}', "the grammar cannot be used"),
    ],
)
def test_an_invalid_schema_is_refused(content: str, message: str, tiny_pte: Path, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as caught:
        command.main([str(tiny_pte), "--json-schema", str(path)])
    assert "\n" not in str(caught.value)


def test_bad_flags_are_refused(tiny_pte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="absent is not a file; give one with a JSON schema"):
        command.main([str(tiny_pte), "--json-schema", str(tmp_path / "absent")])
    with pytest.raises(InputError, match=r"the grammar cannot be used \(unclosed group\); simplify or correct it"):
        command.main([str(tiny_pte), "--regex", "(a"])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for flag, value in (("--regex", "a"), ("--json-schema", "schema.json")):
        with pytest.raises(InputError, match=r"pip install 'llama-pte\[constrain\]'"):
            command.main([str(tiny_pte), flag, value])


def test_a_text_that_cannot_be_constrained_is_refused() -> None:
    tokenizer = open_tokenizer(BUILT_IN / "tokenizer.model")
    with pytest.raises(InputError, match="has no tokenizer"):
        Constraint(regex("a"), None, (2,), 2048, [1])
    with pytest.raises(InputError, match="has no stop token"):
        Constraint(regex("a"), tokenizer, (), 2048, [1])
    half = next(i for i in range(300) if tokenizer.piece(i, first=False) == b"\xe2")
    assert decode(tokenizer, [half]) == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(InputError, match="the prompt ends inside a character"):
        Constraint(regex("a"), tokenizer, (2,), 2048, [1, half])


class Letters:
    """A tokenizer of two letters and a space, which is removed at the start of a text."""

    kind, data, vocab_size, bos_id, stop_ids = "letters", b"", 4, None, (3,)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return ["ab ".index(letter) for letter in text if letter in "ab "]

    def piece(self, token: int, first: bool) -> bytes:
        return [b"a", b"b", b"" if first else b" ", b""][token]


def test_a_grammar_that_the_vocabulary_cannot_spell_is_refused() -> None:
    constraint = Constraint(regex("a c"), Letters(), (3,), 4, [3])
    for token in (0, 2):
        assert np.flatnonzero(constraint.allowed()).tolist() == [token]
        constraint.take(token)
    with pytest.raises(InputError, match="no token continues the text by the grammar"):
        constraint.allowed()
    with pytest.raises(InputError, match="no token that can begin a text follows the grammar"):
        Constraint(regex(" a"), Letters(), (3,), 4, [3]).allowed()
