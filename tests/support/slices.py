"""Random models in tensor-parallel slices, run eagerly with a program's interface."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from export.lowering.assemble import Assembled
from export.lowering.slices import SlicedSource
from export.lowering.trace import GraphOptions, half_step
from export.planning.plan import Plan
from export.planning.sharding import Sharding
from export.weights.scheme import SCHEMES, Scheme
from export.weights.source import WeightSource, piece_names
from model.config import ModelConfig
from runtime.engine.kv_cache import copied
from runtime.engine.tensor_parallel import Alone, ParallelSlices
from runtime.pte.metadata import Metadata, Requirements
from runtime.pte.parts import join_parts
from tests.conftest import planned, random_model

GROUPED = ModelConfig(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=64, vocab_size=93, context=40, tied=True
)
"""A model whose vocabulary size is prime to every number of slices."""

PADDED = replace(GROUPED, dim=48, n_heads=6, n_kv_heads=3, hidden_dim=61)
"""A model whose heads and hidden units cannot be divided by four; the last of four slices has no head of the model."""

GRAPH = GraphOptions(40, 7, "fused", max_rows=3)

UNUSUAL = {
    "biases": replace(GROUPED, qkv_bias=True, out_bias=True, ffn_bias=True, head_bias=True, tied=False),
    "one KV head in all slices": replace(GROUPED, n_kv_heads=1),
    "heads of one group in two slices": replace(GROUPED, n_heads=12, n_kv_heads=3),
    "heads and hidden units that are not divided": PADDED,
    "such heads, biases, norms of heads, no gate": replace(
        PADDED,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        norm="layer",
        norm_bias=True,
        qk_norm=True,
        gated=False,
        activation="gelu",
    ),
    "norms of heads, caps, partly rotated": replace(
        GROUPED, qk_norm=True, attention_softcap=3.0, logit_softcap=5.0, rotary_dim=4, nope_layers=(1,)
    ),
    "a window, scales, no gate": replace(
        GROUPED,
        sliding_window=6,
        local_layers=(0,),
        embedding_scale=3.0,
        residual_scale=0.5,
        logit_scale=0.25,
        gated=False,
        activation="gelu_tanh",
    ),
    "learned positions, LayerNorm": replace(
        GROUPED, positions="learned", norm="layer", norm_bias=True, out_bias=True, gated=False, activation="gelu"
    ),
}


def in_slices(config: ModelConfig, count: int, scheme: Scheme = SCHEMES["fp32"]) -> Plan:
    """Returns the export plan of a random model in `count` slices."""
    model = random_model(config)
    source = WeightSource(config, model.state_dict(), scheme, slices=count)
    plan = replace(planned(model, GRAPH, scheme), source=source, sharding=Sharding(slices=count))
    plan.provenance["options"]["tensor_parallel"] = count
    return plan


def metadata_of(plan: Plan, number: int) -> Metadata:
    """Returns the metadata of one slice's file, without a backend's requirements."""
    return plan.metadata(Assembled(None, Requirements("", (), ()), 0), plan.shards[number])


class EagerSlice:
    """Runs one slice of a random model eagerly, half a block at a time, with the interface of its file."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.metadata = metadata_of(plan, number)
        source = SlicedSource(plan.source, number, plan.sharding.slices)
        self._model = source.sliced({name: source.piece(name) for name in piece_names(source.config)})

    def load(self) -> None:
        """Does nothing, as the weights are in memory already."""

    def run(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (spec,) = (spec for spec in self.metadata.methods if spec.name == name)
        length, rows = inputs["tokens"].shape[1], inputs["select"].shape[1]
        for each in spec.inputs:
            given = inputs[each.name]
            assert tuple(given.shape) == each.sizes(length, rows), each.name
            assert given.is_contiguous(), each.name
        half = self._model.get_submodule(spec.half)
        outputs = half_step(half, spec.start_layer, {each.name: inputs[each.name] for each in spec.inputs})
        return {each.name: outputs[each.name] for each in spec.outputs}


class EagerSlices:
    """Runs all slices of a random model eagerly, with a program's interface."""

    def __init__(self, plan: Plan) -> None:
        slices = [EagerSlice(plan, number) for number in range(plan.sharding.slices)]
        self.metadata: Metadata = join_parts({Path(str(number)): each.metadata for number, each in enumerate(slices)})
        self.step = ParallelSlices(slices[::-1], self.metadata, Alone()).step  # type: ignore[arg-type]


class Meeting:
    """A group of threads that have one slice each, with a process group's interface."""

    def __init__(self, number: int, given: list[Tensor], barrier: threading.Barrier) -> None:
        self._number, self._given, self._barrier = number, given, barrier

    def _all(self, tensor: Tensor) -> list[Tensor]:
        self._barrier.wait()
        self._given[self._number] = copied(tensor)
        self._barrier.wait()
        return list(self._given)

    def summed(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._all(tensor)).sum(dim=0)

    def gathered(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._all(tensor), dim=-1)
