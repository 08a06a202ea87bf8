import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model.config import ModelConfig, RopeScaling
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
    torch.testing.assert_close(rope.inverse_frequencies(config, config.context), theirs.inv_freq, atol=0, rtol=1e-6)


def test_slices_are_rows_of_the_table_and_repeat_the_last_past_its_end() -> None:
    tables = rope.tables(TOY, 10)
    cos, sin = rope.slices(tables, 7, 5)
    assert cos.shape == sin.shape == (1, 5, TOY.head_dim // 2)
    for row, position in enumerate([7, 8, 9, 9, 9]):
        assert torch.equal(cos[0, row], tables[0][position])
        assert torch.equal(sin[0, row], tables[1][position])
