import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.weights.formats.blocks import Blocks
from export.weights.formats.float32 import FLOAT
from export.weights.formats.format import Format
from export.weights.formats.integer import BYTE, Integer
from export.weights.scheme import SCHEMES, Scheme, adjusted, format_exceptions, matrices
from model.block_linear import BLOCK_FORMS
from model.errors import InputError
from model.model import Llama
from tests.conftest import TOY

FOUR = Integer(4, 32)


def test_each_matrix_has_its_format() -> None:
    others = {"layers.1": BYTE, "layers.2": BYTE, "layers.2.attention.wv.weight": FLOAT}
    scheme = Scheme(linear=FOUR, head=FLOAT, embedding=BYTE, others=others)
    assert scheme.format("tok_embeddings.weight", 64) == BYTE
    assert scheme.format("head.output.weight", 64) == FLOAT
    assert scheme.format("layers.0.attention.wq.weight", 64) == FOUR
    assert scheme.format("layers.0.feed_forward.w2.weight", 172) == BYTE, "no whole groups"
    assert scheme.format("layers.1.attention.wq.weight", 64) == BYTE
    assert scheme.format("layers.11.attention.wq.weight", 64) == FOUR
    assert scheme.format("layers.2.attention.wv.weight", 64) == FLOAT, "its own name comes before its block's"
    assert scheme.format("layers.2.attention.wk.weight", 64) == BYTE
    assert scheme.format("layers.0.feed_forward.router.weight", 64) == FLOAT


FORMATS = st.sampled_from([FLOAT, BYTE, FOUR, Integer(4, 128), *(Blocks.of(name) for name in BLOCK_FORMS)])
NAMES = st.sampled_from(["layers.0", "layers.13", *matrices(TOY)])


@given(
    st.builds(
        Scheme,
        FORMATS,
        FORMATS,
        FORMATS,
        st.dictionaries(NAMES, FORMATS),
        st.sampled_from(["nearest", "hqq"]),
        st.sampled_from(["float32", "int8"]),
    )
)
def test_what_a_file_says_is_the_scheme_again(scheme: Scheme) -> None:
    assert Scheme.parse(json.loads(json.dumps(scheme.to_json()))) == scheme
    assert set(scheme.formats) == {scheme.linear, scheme.head, scheme.embedding, *scheme.others.values()}


def test_files_of_the_first_schemes_are_read() -> None:
    found = SCHEMES["mixed"].to_json() | {"careful": [1, 3]}
    del found["others"]
    assert Scheme.parse(found) == replace(SCHEMES["mixed"], others={"layers.1": BYTE, "layers.3": BYTE})


def test_flags_change_what_they_name() -> None:
    assert adjusted(SCHEMES["8da4w"], None, None, None, "nearest") == SCHEMES["8da4w"]
    assert adjusted(SCHEMES["8da4w"], 128, 4, 8, "hqq") == Scheme(
        linear=Integer(4, 128), head=BYTE, embedding=Integer(4, 128), rounding="hqq"
    )
    assert adjusted(SCHEMES["8da8w"], None, 4, 4, "nearest") == Scheme(linear=BYTE, head=FOUR, embedding=FOUR)
    assert adjusted(SCHEMES["fp32"], None, 8, None, "nearest") == Scheme(embedding=BYTE)


def test_a_tied_head_shares_the_embeddings_table_of_8_bits() -> None:
    def head(quantize: str, *flags: int | None) -> Format:
        return adjusted(SCHEMES[quantize], *flags, "nearest", one_table=True).head

    assert head("8da4w", None, None, None) == BYTE
    assert head("8da4w", 64, None, None) == BYTE
    assert head("8da4w", None, None, 4) == FOUR, "as it was asked for"
    assert head("8da4w", None, 4, None) == FOUR, "one table already"
    assert head("fp32", None, 8, None) == FLOAT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((48, None, None), "--group-size 48 is invalid; give 32, 64, 128"),
        ((64, None, None), "--group-size 64 needs 4-bit weights"),
        ((None, 5, None), "--embedding-bits 5 is invalid; give 4 or 8"),
        ((None, None, 16), "--head-bits 16 is invalid; give 4 or 8"),
    ],
)
def test_impossible_schemes_are_refused(flags: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adjusted(SCHEMES["8da8w"], *flags, "nearest")


def test_matrices_and_kept_layers_are_those_of_the_model() -> None:
    found = matrices(TOY)
    named = {name: tuple(p.shape) for name, p in Llama(replace(TOY, tied=False)).named_parameters() if p.dim() == 2}
    assert found == {name: shape for name, shape in named.items() if name != "tok_embeddings.weight"}
    assert format_exceptions(TOY, SCHEMES["fp32"]) == {}
    w2 = {f"layers.{layer}.feed_forward.w2.weight": BYTE for layer in (0, 1)}  # 48 columns
    assert format_exceptions(TOY, SCHEMES["8da4w"]) == w2


def test_size_counts_weights_and_scales() -> None:
    assert FLOAT.nbytes(10, 64) == 2560
    assert BYTE.nbytes(10, 64) == 10 * (64 + 4)
    assert FOUR.nbytes(10, 64) == 10 * (32 + 4)
