from dataclasses import replace

import pytest

from model.config import RopeScaling
from tests.conftest import TOY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 7}, "7 of each head's values are rotated"),
        ({"n_layers": 10**9}, "n_layers is 1000000000: it must be a whole number from 1 to 1024"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"tied": "yes"}, "tied is 'yes'"),
        ({"rope_theta": float("inf")}, "rope_theta inf"),
        ({"norm_eps": 0.0}, "norm_eps 0.0"),
        ({"rope_theta": float("nan")}, "rope_theta nan"),
    ],
)
def test_an_impossible_dimension_is_refused_by_name_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TOY, **change)


@pytest.mark.parametrize(
    "change", [{"factor": 0.5}, {"factor": float("nan")}, {"low_freq_factor": 4.0}, {"original_context": 0}]
)
def test_impossible_scaling_is_refused(change: dict[str, float]) -> None:
    good = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}
    RopeScaling(**good)
    with pytest.raises(ValueError, match="rope scaling"):
        RopeScaling(**(good | change))
