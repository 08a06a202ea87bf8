"""Schemes by GGUF types; a file's own types are tested in test_gguf.py."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from export.weights.formats.blocks import Blocks
from export.weights.gguf_types import MIXTURES, default_scheme, named_scheme, of_types
from export.weights.scheme import matrices
from model.config import ModelConfig
from model.errors import InputError

SMALL = ModelConfig(
    dim=256, n_layers=16, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, vocab_size=512, context=64
)
SHAPES = {
    "16 blocks": SMALL,
    "tied, no whole blocks of 256": replace(
        SMALL, dim=288, n_layers=8, n_heads=6, n_kv_heads=3, head_dim=48, hidden_dim=544, tied=True
    ),
    "80 blocks, grouped queries": replace(SMALL, n_layers=80),
    "8 experts": replace(SMALL, n_experts=8, n_chosen_experts=2),
}
LETTERS = {"4": "Q4_K", "5": "Q5_K", "6": "Q6_K", "8": "Q8_0", "a": "Q5_0", "b": "Q5_1"}
LLAMA_CPP: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("16 blocks", "q4_k_s"): ("4", "6", "4", "4", "5555" + "4" * 12, "4", "55" + "4" * 14),
    ("16 blocks", "q4_k_m"): ("4", "6", "4", "4", "6644644644644666", "4", "6644644644644666"),
    ("16 blocks", "q5_k_s"): ("5", "6", "5", "5", "5", "5", "5"),
    ("16 blocks", "q5_k_m"): ("5", "6", "5", "5", "6655655655655666", "5", "6655655655655666"),
    ("16 blocks", "q6_k"): ("6", "6", "6", "6", "6", "6", "6"),
    ("tied, no whole blocks of 256", "q4_k_s"): ("8", "8", "a", "a", "bbbbaaaa", "a", "baaaaaaa"),
    ("tied, no whole blocks of 256", "q4_k_m"): ("8", "8", "a", "a", "8aa8aa88", "a", "8aa8aa88"),
    ("tied, no whole blocks of 256", "q5_k_s"): ("8", "8", "b", "b", "b", "b", "b"),
    ("tied, no whole blocks of 256", "q5_k_m"): ("8", "8", "b", "b", "8bb8bb88", "b", "8bb8bb88"),
    ("tied, no whole blocks of 256", "q6_k"): ("8", "8", "8", "8", "8", "8", "8"),
    ("80 blocks, grouped queries", "q4_k_s"): ("4", "6", "4", "4", "5", "4", "5" * 10 + "4" * 70),
    ("80 blocks, grouped queries", "q4_k_m"): (
        *("4", "6", "4", "4"),
        "6666666666" + "556" * 20 + "6666666666",
        "4",
        "6666666666" + "446" * 20 + "6666666666",
    ),
    ("80 blocks, grouped queries", "q5_k_s"): ("5", "6", "5", "5", "5", "5", "5"),
    ("8 experts", "q4_k_s"): ("4", "6", "4", "8", "8", "5", "55" + "4" * 14),
    ("8 experts", "q4_k_m"): ("4", "6", "4", "8", "8", "5", "6644644644644666"),
    ("8 experts", "q5_k_m"): ("5", "6", "5", "8", "8", "5", "6655655655655666"),
    ("8 experts", "q6_k"): ("6", "6", "6", "8", "8", "6", "6"),
}
"""What llama_model_quantize of llama-cpp-python 0.3.36 made of random models of these shapes: the types of token_embd,
output, attn_q, attn_k, attn_v, attn_output and ffn_down, one letter for all blocks or one for each. ffn_gate and ffn_up
have the type of attn_q.
"""


@pytest.mark.parametrize(("shape", "name"), LLAMA_CPP)
def test_mixtures_have_the_types_that_llama_cpp_gives_them(shape: str, name: str) -> None:
    config, (embedding, head, *blocks) = SHAPES[shape], LLAMA_CPP[shape, name]
    scheme = named_scheme(name, config, {})
    assert scheme.embedding == Blocks.of(LETTERS[embedding])
    assert scheme.head == Blocks.of(LETTERS[head])
    by_role = dict(zip(("wq", "wk", "wv", "wo", "w2"), blocks, strict=True))
    for matrix, (_, columns) in matrices(config).items():
        role = matrix.split(".")[-2]
        letters = by_role.get(role, by_role["wq"])
        if role not in ("output", "router"):
            letter = letters[int(matrix.split(".")[1])] if len(letters) > 1 else letters
            assert scheme.format(matrix, columns) == Blocks.of(LETTERS[letter]), matrix


@pytest.mark.parametrize("name", MIXTURES)
def test_a_file_in_a_mixtures_types_has_the_mixtures_scheme(name: str) -> None:
    config = SHAPES["tied, no whole blocks of 256"]
    scheme = named_scheme(name, config, {})
    types = {matrix: str(scheme.format(matrix, shape[1]).name) for matrix, shape in matrices(config).items()}  # type: ignore[attr-defined]
    del types["head.output.weight"]
    assert named_scheme("gguf", config, types | {"tok_embeddings.weight": "Q8_0"}) == scheme


def test_rows_that_no_block_divides_and_routers_are_float32() -> None:
    narrow = named_scheme("q4_k_m", replace(SMALL, hidden_dim=344), {})
    assert str(narrow.format("layers.0.feed_forward.w2.weight", 344)) == "float32"
    experts = named_scheme("q4_k_m", SHAPES["8 experts"], {})
    assert str(experts.format("layers.0.feed_forward.router.weight", 256)) == "float32"


def test_a_matrix_in_a_type_without_operator_is_float32() -> None:
    types = dict.fromkeys(matrices(SMALL), "Q4_0") | {"layers.3.attention.wv.weight": "Q3_K"}
    scheme = of_types(SMALL, types | {"tok_embeddings.weight": "F16"})
    assert (str(scheme.linear), str(scheme.embedding)) == ("Q4_0", "float32")
    assert {name: str(form) for name, form in scheme.others.items()} == {"layers.3.attention.wv.weight": "float32"}


def test_the_default_is_what_a_file_has_and_the_backend_runs() -> None:
    assert default_scheme({"a": "F32", "b": "Q4_0"}, {"float32", "blocks"}) == "gguf"
    assert default_scheme({"a": "F32", "b": "Q4_0"}, {"float32"}) == "fp32"
    assert default_scheme({"a": "F16", "b": "Q2_K"}, {"float32", "blocks"}) == "fp32"
    assert default_scheme({}, {"float32", "blocks"}) == "fp32"


def test_weights_that_are_not_in_blocks_have_no_types_to_keep() -> None:
    for types, found in (({}, "is none; choose"), ({"a": "F32", "b": "Q2_K"}, "has F32 and Q2_K; choose from fp32")):
        with pytest.raises(InputError, match=rf"--quantize gguf needs a GGUF with weights in .* checkpoint {found}"):
            named_scheme("gguf", SMALL, types)
