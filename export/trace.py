"""trace: the eager model becomes one torch.export graph per method, with its signature written down."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.metadata import MethodSpec, TensorSpec
from model.config import ModelConfig
from model.fused import FusedLlama, Segment
from model.kv_rows import row_width
from model.model import Block, Head, Llama
from preproc.positions import mask_name, names


@dataclass(frozen=True)
class GraphOptions:
    """What the graphs take and give.

    Attributes:
        max_seq_len: positions of a text, and the capacity of the caches (T); local blocks' have the window's.
        prefill_chunk: L of `prefill`; 1 for none.
        attention: "aten", plain operators on whole caches: static, and for every backend; or "fused", one operator that
            reads as much of the caches as is filled: one method for any number of tokens.
        kv_cache: whether the methods take and extend caches; otherwise each step takes the whole text.
        hidden_states: whether they also return what the last block does, normalised.
        batch_size: texts that a step extends at once (B), each at a position of its own; more than 1 where attention is
            fused.
        max_rows: the most rows of logits that a step returns of each text; more than 1 where attention is fused.
    """

    max_seq_len: int
    prefill_chunk: int
    attention: str = "aten"
    kv_cache: bool = True
    hidden_states: bool = False
    batch_size: int = 1
    max_rows: int = 1


def trace(model: Llama | FusedLlama, methods: Iterable[MethodSpec]) -> dict[str, ExportedProgram]:
    """The whole model as one graph per method. See tests/bench/NOTES.md for what was tried.

    Parts of the model may be lowered already: they are then calls in the graph.
    """
    return {spec.name: _export(_Flat(model, spec), spec.inputs, spec) for spec in methods}


def pieces(config: ModelConfig, fused: bool, careful: Collection[int] = ()) -> dict[str, str]:
    """The parts of the model that a backend can take as one: name -> the first with an equal graph.

    Blocks of one kind differ only in their weights.

    Args:
        fused: whether attention is an operator of its own, between segments.
        careful: blocks whose weights are stored in another format than the others'.
    """
    found, kinds, layers = dict[str, str](), dict[tuple[bool, ...], str](), config.n_layers
    for number in range(layers + 1 if fused else layers):
        if fused:
            name = f"segments.{number}"
            kind: tuple[bool, ...] = (number == 0, number == layers, number - 1 in careful, number in careful)
        else:
            name = f"layers.{number}"
            kind = (config.is_local(number), number in config.nope_layers, number in careful)
        found[name] = kinds.setdefault(kind, name)
    return found if fused else found | {"head": "head"}


def parameter_name(config: ModelConfig, piece: str, role: str) -> str:
    """What a parameter of a piece is called in the model: layers.3.attention.wo.weight."""
    if not piece.startswith("segments."):
        return f"{piece}.{role}"
    side, role = role.split(".", 1)
    layer = int(piece.removeprefix("segments.")) - (side == "before")
    return f"head.{role}" if layer == config.n_layers else f"layers.{layer}.{role}"


def trace_piece(config: ModelConfig, name: str, module: nn.Module, spec: MethodSpec) -> ExportedProgram:
    """The graph of one of `pieces`, as `spec` calls it.

    Args:
        module: the Block, Head or Segment.
    """
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    stream = inputs["tokens"].shape
    taken = [TensorSpec("x", (*stream, config.dim), "float32")]
    if isinstance(module, Segment) and module.before:
        taken += [TensorSpec("out", (*stream, config.n_heads * config.head_dim), "float32")]
    if isinstance(module.after if isinstance(module, Segment) else module, Head):
        taken += [inputs["select"]]
    if isinstance(module, Block):
        layer = int(name.removeprefix("layers."))
        wanted = ("cos", "sin", mask_name(config, layer), f"k_cache.{layer}", f"v_cache.{layer}")
        taken += [inputs[role] for role in wanted if role in inputs]
    return _export(_FlatPiece(module, rotated="cos" in inputs), taken, spec)


def _export(module: nn.Module, inputs: Sequence[TensorSpec], spec: MethodSpec) -> ExportedProgram:
    shapes = dynamic_shapes("tensors", inputs, spec)
    with torch.no_grad():
        return torch.export.export(
            module,
            tuple(tensor.zeros(spec.max_length, spec.max_rows) for tensor in inputs),
            dynamic_shapes=shapes,
            prefer_deferred_runtime_asserts_over_guards=shapes is not None,
        )


def dynamic_shapes(name: str, inputs: Sequence[TensorSpec], spec: MethodSpec) -> dict[str, Any] | None:
    """For torch.export, of a module whose forward takes *name: each tensor's axes whose size is not fixed."""
    axes = [{axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)} for tensor in inputs]
    if not any(axes):
        return None
    ranges = {"L": (spec.min_length, spec.max_length), "R": (1, spec.max_rows)}
    used = {size for found in axes for size in found.values()}
    sizes = {size: torch.export.Dim(size, min=ranges[size][0], max=ranges[size][1]) for size in used}
    return {name: tuple({axis: sizes[size] for axis, size in found.items()} for found in axes)}


def signatures(config: ModelConfig, options: GraphOptions, kv_dtype: str = "float32") -> tuple[MethodSpec, ...]:
    """`decode` (one token) and, unless the chunk is one token, `prefill` (prefill_chunk tokens). Only `forward` where
    attention is fused (up to prefill_chunk tokens), and without caches (max_seq_len tokens). All return the logits of
    one row of each text, and where attention is fused of up to max_rows.
    """
    if options.attention == "fused" or not options.kv_cache:
        length = options.prefill_chunk if options.kv_cache else options.max_seq_len
        return (signature(config, "forward", length, options, kv_dtype),)
    lengths = {"decode": 1} | ({"prefill": options.prefill_chunk} if options.prefill_chunk > 1 else {})
    return tuple(signature(config, name, length, options, kv_dtype) for name, length in lengths.items())


def signature(
    config: ModelConfig, name: str, length: int, options: GraphOptions, kv_dtype: str = "float32"
) -> MethodSpec:
    """The whole model for `length` tokens, or up to so many where attention is fused."""
    is_fused = options.attention == "fused" and options.kv_cache
    B = options.batch_size
    L: int | Literal["L"] = "L" if is_fused and length > 1 else length
    max_rows = min(options.max_rows, length) if is_fused else 1
    R: int | Literal["R"] = "R" if max_rows > 1 else 1
    capacities = [_capacity(config, layer, options) for layer in range(config.n_layers)]
    heads, pairs = config.n_heads if config.positions == "alibi" else 1, config.rotated // 2
    position_inputs = {
        "positions": TensorSpec("positions", (B, L), "int64"),
        "cos": TensorSpec("cos", (B, L, pairs), "float32"),
        "sin": TensorSpec("sin", (B, L, pairs), "float32"),
        "start": TensorSpec("start", (B,), "int64"),
    }
    for layer, capacity in enumerate(capacities):
        mask = mask_name(config, layer)
        position_inputs[mask] = TensorSpec(mask, (heads, length, capacity + length), "float32")

    def rows(role: str, positions: Sequence[int | Literal["L"]]) -> list[TensorSpec]:
        shapes = [(B * config.n_kv_heads, count, row_width(config.head_dim, kv_dtype)) for count in positions]
        return [TensorSpec(f"{role}.{layer}", shape, kv_dtype) for layer, shape in enumerate(shapes)]

    inputs = [TensorSpec("tokens", (B, L), "int64"), *(position_inputs[role] for role in names(config, is_fused))]
    inputs += [TensorSpec("select", (B, R, L), "float32")]
    outputs = [TensorSpec("logits", (B, R, config.vocab_size), "float32")]
    if options.kv_cache:
        inputs += [*rows("k_cache", capacities), *rows("v_cache", capacities)]
        outputs += [*rows("k_rows", [L] * config.n_layers), *rows("v_rows", [L] * config.n_layers)]
    if options.hidden_states:
        outputs += [TensorSpec("hidden", (B, L, config.dim), "float32")]
    return MethodSpec(
        name=name,
        min_length=1 if is_fused else length,
        max_length=length,
        max_rows=max_rows,
        start_layer=0,
        end_layer=config.n_layers,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _capacity(config: ModelConfig, layer: int, options: GraphOptions) -> int:
    """Of a block's cache: a local block's is a ring of the window's size."""
    if not options.kv_cache:
        return 0
    return min(options.max_seq_len, config.window(layer) or options.max_seq_len)


def step(model: Llama | FusedLlama, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Runs the model on inputs by the names of a `signature`, and returns its outputs by theirs."""
    config, layers = model.config, range(model.config.n_layers)
    tokens, select = inputs["tokens"], inputs["select"]
    angles = (inputs["cos"], inputs["sin"]) if "cos" in inputs else None
    caches = [[inputs[f"{kind}_cache.{layer}"] for layer in layers] for kind in "kv" if f"{kind}_cache.0" in inputs]
    if isinstance(model, FusedLlama):
        found = model(tokens, angles, inputs["start"], select, *caches, positions=inputs.get("positions"))
    else:
        masks = [inputs[mask_name(config, layer)] for layer in layers]
        found = model(tokens, angles, masks, select, *caches, positions=inputs.get("positions"))
    return {
        "logits": found.logits,
        **{f"k_rows.{layer}": rows for layer, rows in enumerate(found.k_rows)},
        **{f"v_rows.{layer}": rows for layer, rows in enumerate(found.v_rows)},
        "hidden": found.hidden,
    }


class _Flat(nn.Module):
    """The model with the flat arguments and results of a `signature`."""

    def __init__(self, model: Llama | FusedLlama, spec: MethodSpec) -> None:
        super().__init__()
        self.model = model
        self.inputs = [tensor.name for tensor in spec.inputs]
        self.outputs = [tensor.name for tensor in spec.outputs]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        found = step(self.model, dict(zip(self.inputs, tensors, strict=True)))
        return [found[name] for name in self.outputs]


class _FlatPiece(nn.Module):
    """A piece with flat arguments; a block's are x, cos and sin if there are any, and the others in their order."""

    def __init__(self, module: nn.Module, rotated: bool) -> None:
        super().__init__()
        self.module = module
        self.rotated = rotated

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.module, Head | Segment):
            return self.module(*tensors)
        x, *others = tensors
        angles, rest = (others[:2], others[2:]) if self.rotated else (None, others)
        return self.module(x, angles, *rest)
