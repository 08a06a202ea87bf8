import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest

from model.config import ModelConfig, RopeScaling
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
        ({"rotary_dim": 10}, "rotary_dim is 10: it must be a whole number from 2 to 8"),
        ({"rotary_dim": 5}, "5 of each head's values are rotated"),
        ({"nope_layers": (2,)}, r"nope_layers is \(2,\): layers run from 0 to 1"),
        ({"local_layers": (0,)}, "but there is no sliding_window"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"n_experts": 4, "n_chosen_experts": 5}, "n_chosen_experts is 5"),
        ({"n_experts": 4}, "n_chosen_experts is 0"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"positions": "none"}, "positions is 'none'"),
        ({"logit_scale": 0}, "logit_scale is 0"),
        ({"attention_softcap": -1.0}, "attention_softcap is -1.0"),
        ({"rope_scaling": RopeScaling("longrope", 2.0, 8, short_factors=(1.0,), long_factors=(1.0,))}, "4 pairs are"),
        ({"rope_scaling": RopeScaling("dynamic", 2.0, 8), "rotary_dim": 2}, "needs two rotated pairs"),
        ({"rope_scaling": RopeScaling("yarn", 2.0, 8), "rope_theta": 1.0}, "rope_theta is 1.0: yarn needs more"),
    ],
)
def test_an_impossible_dimension_is_refused_by_name_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TOY, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "fire"},
        {"factor": 0.5},
        {"factor": float("nan")},
        {"low_freq_factor": 4.0},
        {"beta_slow": 32.0},
        {"original_context": 0},
        {"attention_factor": 0.0},
        {"kind": "longrope"},
        {"long_factors": (2.0,)},
        {"kind": "longrope", "short_factors": (1.0,), "long_factors": (0.0,)},
    ],
)
def test_impossible_scaling_is_refused(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192
    }  # fmt: skip
    RopeScaling(**good)
    with pytest.raises(ValueError, match=r"rope scaling|attention_factor is"):
        RopeScaling(**(good | change))


def test_a_config_survives_json() -> None:
    scaling = RopeScaling("longrope", 2.0, 8, short_factors=(1.0,) * 4, long_factors=(1.5, 2.0, 2.5, 3.0))
    config = replace(
        TOY, rope_scaling=scaling, sliding_window=8, local_layers=(1,), nope_layers=(0,), logit_softcap=30.0
    )
    assert ModelConfig.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config
