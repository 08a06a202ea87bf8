from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest

from export.lowering import lower
from export.lowering.trace import GraphOptions, signatures
from export.weights.scheme import SCHEMES
from tests.conftest import TOY


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["fp32", "8da4w"])
@pytest.mark.parametrize("attention", ["fused", "aten"])
def test_code_is_the_same_without_them(quantize: str, attention: str) -> None:
    config = replace(TOY, hidden_dim=64)
    given = config, [signatures(config, GraphOptions(48, 7, attention=attention))], "xnnpack", SCHEMES[quantize]
    short = lower.lower(*given)
    with mock.patch.object(lower, "no_patterns", nullcontext):
        plain = lower.lower.__wrapped__(*given)
    assert short.keys() == plain.keys()
    for name, code in short.items():
        for ours, theirs in zip(code.delegates, plain[name].delegates, strict=True):
            assert ours.payload == theirs.payload, name
            assert ours.data == theirs.data, name
