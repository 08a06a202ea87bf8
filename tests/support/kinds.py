"""One small model for each combination of features that the runtimes handle differently, exported or run eagerly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from export.lowering.assemble import Assembled
from export.lowering.trace import GraphOptions, step
from export.planning.plan import Plan
from export.weights.scheme import Scheme
from model.config import ModelConfig
from model.fused_attention import FusedLlama
from model.model import Llama
from preproc.position_inputs import Positions, names
from runtime.pte.metadata import Metadata, MethodSpec, Requirements
from tests.conftest import planned, random_model, write_pte

CONTEXT = 40
CHUNK = 7
VOCABULARY = 64
PLAIN = ModelConfig(
    dim=32, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=8, hidden_dim=48, vocab_size=VOCABULARY, context=CONTEXT
)
WINDOW = replace(PLAIN, sliding_window=6, local_layers=(0, 1))
OPTIONS = GraphOptions(CONTEXT, CHUNK, hidden_states=True)
UNCACHED = replace(OPTIONS, kv_cache=False)


FUSED = replace(OPTIONS, attention="fused", max_rows=3)


@dataclass(frozen=True)
class Kind:
    """A model's dimensions, its graph options, and the dtype of its KV cache."""

    config: ModelConfig
    options: GraphOptions = OPTIONS
    kv_dtype: str = "float32"

    @property
    def tolerance(self) -> float:
        """Returns the tolerance of logits, which allows for different rounding of numbers in the cache."""
        return {"float32": 1e-3, "float16": 1e-2, "int8": 0.3}[self.kv_dtype]

    @property
    def model(self) -> Llama:
        """Returns the model with random weights."""
        model = random_model(self.config)
        for block in model.layers.values():
            block.attention.kv_dtype = self.kv_dtype
        return model


KINDS = {
    "window": Kind(WINDOW),
    "window longer than a chunk": Kind(replace(WINDOW, sliding_window=11)),
    "window longer than the context": Kind(replace(WINDOW, sliding_window=CONTEXT + 5)),
    "window of one": Kind(replace(WINDOW, sliding_window=1)),
    "alternating windows": Kind(replace(WINDOW, local_layers=(0,))),
    "local rotary frequencies": Kind(replace(WINDOW, local_layers=(0,), local_rope_theta=100.0)),
    "alibi": Kind(replace(PLAIN, positions="alibi")),
    "alibi in a window": Kind(replace(WINDOW, positions="alibi", local_layers=(1,))),
    "learned positions": Kind(replace(PLAIN, positions="learned")),
    "partly rotated": Kind(replace(PLAIN, rotary_dim=4, nope_layers=(1,))),
    "parallel": Kind(replace(PLAIN, parallel=True, norm="layer", norm_bias=True, activation="gelu", gated=False)),
    "fused": Kind(PLAIN, FUSED),
    "fused, alternating windows": Kind(replace(WINDOW, local_layers=(0,)), FUSED),
    "fused, local rotary frequencies": Kind(replace(WINDOW, local_layers=(0,), local_rope_theta=100.0), FUSED),
    "fused, window of one": Kind(replace(WINDOW, sliding_window=1), replace(FUSED, prefill_chunk=1)),
    "fused, alibi in a window": Kind(replace(WINDOW, positions="alibi", local_layers=(1,)), FUSED),
    "fused, learned positions": Kind(replace(PLAIN, positions="learned"), FUSED),
    "fused, partly rotated": Kind(replace(PLAIN, rotary_dim=4, nope_layers=(1,), qk_norm=True), FUSED),
    "fused, parallel": Kind(replace(PLAIN, parallel=True, norm="layer", attention_softcap=3.0), FUSED),
    "fused, float16": Kind(PLAIN, FUSED, "float16"),
    "fused, int8 in a window": Kind(WINDOW, FUSED, "int8"),
    "no cache": Kind(PLAIN, UNCACHED),
    "no cache, alternating windows": Kind(replace(WINDOW, local_layers=(0,)), UNCACHED),
    "no cache, alibi": Kind(replace(PLAIN, positions="alibi"), UNCACHED),
    "no cache, learned positions": Kind(replace(PLAIN, positions="learned"), replace(UNCACHED, hidden_states=False)),
}


def metadata_of(kind: Kind) -> Metadata:
    """Returns the metadata of a file of this kind, without a backend's requirements."""
    plan = _plan(kind)
    return plan.metadata(Assembled(None, Requirements("", (), ()), 0), plan.shards[0])


def _plan(kind: Kind) -> Plan:
    return planned(kind.model, kind.options, Scheme(kv_dtype=kind.kv_dtype))


def export_kind(kind: Kind, path: Path, backend: str) -> None:
    """Exports the random model that `EagerSteps` runs."""
    write_pte(_plan(kind), path, backend)


class EagerSteps:
    """Runs a random model eagerly, with a program's interface."""

    def __init__(self, kind: Kind) -> None:
        self.metadata = metadata_of(kind)
        self.model = kind.model
        self._run = FusedLlama(self.model) if kind.options.attention == "fused" else self.model

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        length, rows = inputs["tokens"].shape[1], inputs["select"].shape[1]
        assert method.min_length <= length <= method.max_length
        for spec in method.inputs:
            given = inputs[spec.name]
            assert (tuple(given.shape), str(given.dtype)) == (spec.sizes(length, rows), f"torch.{spec.dtype}"), (
                spec.name
            )
            assert given.is_contiguous(), spec.name
        outputs = step(self._run, {spec.name: inputs[spec.name] for spec in method.inputs})
        return {spec.name: outputs[spec.name] for spec in method.outputs}


def recomputed(model: Llama, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns a text's logits [L, V] and hidden states [L, D], computed in one pass without a cache."""
    length = len(tokens)
    positions = Positions.of(model.config, length)
    inputs = {name: positions.make(name, 0, length, capacity=0) for name in names(model.config)}
    outputs = step(model, inputs | {"tokens": torch.tensor([tokens]), "select": torch.eye(length)[None]})
    return outputs["logits"][0], outputs["hidden"][0]
