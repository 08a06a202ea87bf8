import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model.config import ModelConfig, RopeScaling
from model.rotary import attention_factor, inverse_frequencies
from preproc import rope
from tests.conftest import TOY

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_tables_are_those_of_transformers(theta: float, scaled: bool) -> None:
    scaling = RopeScaling("llama3", 8.0, 512) if scaled else None
    config = ModelConfig(256, 1, 4, 4, 64, 8, 8, 4096, rope_theta=theta, rope_scaling=scaling)
    parameters = (LLAMA3 if scaled else {"rope_type": "default"}) | {"rope_theta": theta}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=256, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=dict(parameters)
        )
    )
    cos, sin = theirs(torch.zeros(1), torch.arange(4096).unsqueeze(0))
    ours = rope.tables(config, 4096)
    torch.testing.assert_close(ours[0], cos[0, :, :32], atol=2e-4, rtol=0)  # float32 angles at position 4,095
    torch.testing.assert_close(ours[1], sin[0, :, :32], atol=2e-4, rtol=0)
    torch.testing.assert_close(inverse_frequencies(config, config.context), theirs.inv_freq, atol=0, rtol=1e-6)


DIVISORS = {"short": tuple(1 + i / 64 for i in range(32)), "long": tuple(1 + i / 4 for i in range(32))}
LONGROPE = {"short_factor": list(DIVISORS["short"]), "long_factor": list(DIVISORS["long"])}
LONG = {"short_factors": DIVISORS["short"], "long_factors": DIVISORS["long"]}
ORIGINAL = {"original_max_position_embeddings": 512}

KINDS = {
    "linear": ({"factor": 4.0}, RopeScaling("linear", 4.0, 4096)),
    "dynamic": ({"factor": 2.0}, RopeScaling("dynamic", 2.0, 4096)),
    "yarn": ({"factor": 8.0} | ORIGINAL, RopeScaling("yarn", 8.0, 512)),
    "yarn, all set": (
        {"factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.5} | ORIGINAL,
        RopeScaling("yarn", 8.0, 512, beta_fast=16.0, beta_slow=2.0, truncate=False, attention_factor=1.5),
    ),
    "longrope": ({"factor": 8.0} | LONGROPE | ORIGINAL, RopeScaling("longrope", 8.0, 512, **LONG)),
    "longrope, all set": (
        {"factor": 8.0, "attention_factor": 1.25} | LONGROPE | ORIGINAL,
        RopeScaling("longrope", 8.0, 512, attention_factor=1.25, **LONG),
    ),
    "llama3": (LLAMA3, RopeScaling("llama3", 8.0, 512)),
}
"""transformers' rope_parameters, and the equivalent RopeScaling."""


@pytest.mark.parametrize("length", [1, 512, 513, 4096, 4097, 20000])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_scaling_is_transformers_own(kind: str, length: int) -> None:
    parameters, scaling = KINDS[kind]
    config = ModelConfig(256, 1, 4, 4, 64, 8, 8, 4096, rope_scaling=scaling)
    theirs = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": scaling.kind, "rope_theta": 10000.0} | parameters,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling.kind](theirs, seq_len=length)
    torch.testing.assert_close(inverse_frequencies(config, length), frequencies, atol=0, rtol=1e-6)
    assert attention_factor(scaling) == pytest.approx(factor, abs=1e-12)
    cos, sin = rope.tables(config, length)
    assert cos[0].tolist() == pytest.approx([factor] * 32)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, factor**2))


def test_longrope_and_dynamic_scaling_change_beyond_the_original_context_only() -> None:
    for kind in ("dynamic", "longrope"):
        config = ModelConfig(256, 1, 4, 4, 64, 8, 8, 4096, rope_scaling=KINDS[kind][1])
        original = KINDS[kind][1].original_context
        short, full, beyond = (inverse_frequencies(config, length) for length in (1, original, original + 1))
        assert torch.equal(short, full)
        assert not torch.equal(full, beyond)


def test_a_partly_rotated_head_has_the_frequencies_of_its_rotated_part() -> None:
    config = ModelConfig(256, 1, 4, 4, 64, 8, 8, 4096, rotary_dim=16)
    expected = [10000 ** (-pair / 8) for pair in range(8)]
    assert inverse_frequencies(config, 10).tolist() == pytest.approx(expected, rel=1e-6)
    assert attention_factor(None) == 1
    assert math.isclose(attention_factor(RopeScaling("yarn", 1.0, 512)), 1)


def test_slices_are_rows_of_the_table_and_repeat_the_last_past_its_end() -> None:
    tables = rope.tables(TOY, 10)
    cos, sin = rope.slices(tables, 7, 5)
    assert cos.shape == sin.shape == (1, 5, TOY.head_dim // 2)
    for row, position in enumerate([7, 8, 9, 9, 9]):
        assert torch.equal(cos[0, row], tables[0][position])
        assert torch.equal(sin[0, row], tables[1][position])


@pytest.mark.parametrize("kind", ["llama3", "yarn", "longrope"])
def test_keys_rotated_back_equal_those_of_earlier_positions(kind: str) -> None:
    """Also tests tables with an attention factor, which must be applied to a key only once."""
    config = ModelConfig(256, 1, 4, 4, 64, 8, 8, 4096, rope_scaling=KINDS[kind][1])
    tables = rope.tables(config, 2000)
    key = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    at = [rope.apply(key, tables[0][position], tables[1][position]) for position in (1700, 1100)]
    torch.testing.assert_close(rope.earlier(at[0], tables, 600), at[1], atol=2e-4, rtol=1e-4)
