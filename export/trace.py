"""trace: the eager model becomes one torch.export graph per method, with its signature written down."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.metadata import MethodSpec, TensorSpec
from model.config import ModelConfig
from model.model import Head, Llama
from preproc.positions import mask_name, names


@dataclass(frozen=True)
class GraphOptions:
    """What the graphs take and give.

    Attributes:
        max_seq_len: positions of a text, and the capacity of the caches (T); local blocks' have the window's.
        prefill_chunk: L of `prefill`; 1 for none.
        kv_cache: whether the methods take and extend caches; otherwise each step takes the whole text.
        hidden_states: whether they also return what the last block does, normalised.
    """

    max_seq_len: int
    prefill_chunk: int
    kv_cache: bool = True
    hidden_states: bool = False


def trace(model: Llama, methods: Iterable[MethodSpec]) -> dict[str, ExportedProgram]:
    """The whole model as one graph per method. Static shapes: see tests/bench/NOTES.md for what was tried.

    Parts of the model may be lowered already: they are then calls in the graph.
    """
    with torch.no_grad():
        return {
            spec.name: torch.export.export(_Flat(model, spec), tuple(map(_example, spec.inputs))) for spec in methods
        }


def pieces(config: ModelConfig, careful: Collection[int] = ()) -> dict[str, str]:
    """The parts of the model that a backend can take as one: name -> the first with an equal graph.

    Blocks of one kind differ only in their weights.

    Args:
        careful: blocks whose weights are stored in another format than the others'.
    """
    found, kinds = dict[str, str](), dict[tuple[bool, bool, bool], str]()
    for layer in range(config.n_layers):
        kind = (config.is_local(layer), layer in config.nope_layers, layer in careful)
        found[f"layers.{layer}"] = kinds.setdefault(kind, f"layers.{layer}")
    return found | {"head": "head"}


def trace_piece(config: ModelConfig, name: str, module: nn.Module, spec: MethodSpec) -> ExportedProgram:
    """The graph of one of `pieces`, as `spec` calls it.

    Args:
        module: the Block or Head.
    """
    inputs = {tensor.name: _example(tensor) for tensor in spec.inputs}
    x = torch.zeros(1, spec.max_length, config.dim)
    if name == "head":
        examples: tuple[Tensor, ...] = (x, inputs["select"])
    else:
        layer = int(name.removeprefix("layers."))
        wanted = ("cos", "sin", mask_name(config, layer), f"k_cache.{layer}", f"v_cache.{layer}")
        examples = (x, *(inputs[role] for role in wanted if role in inputs))
    with torch.no_grad():
        return torch.export.export(_FlatPiece(module, rotated="cos" in inputs), examples)


def signatures(config: ModelConfig, options: GraphOptions) -> tuple[MethodSpec, ...]:
    """`decode` (one token) and, unless the chunk is one token, `prefill` (prefill_chunk tokens); without caches only
    `forward` (max_seq_len tokens). All return the logits of one row.
    """
    if not options.kv_cache:
        return (signature(config, "forward", options.max_seq_len, options),)
    lengths = {"decode": 1} | ({"prefill": options.prefill_chunk} if options.prefill_chunk > 1 else {})
    return tuple(signature(config, name, length, options) for name, length in lengths.items())


def signature(config: ModelConfig, name: str, length: int, options: GraphOptions) -> MethodSpec:
    """The whole model for `length` tokens."""
    capacities = [_capacity(config, layer, options) for layer in range(config.n_layers)]
    heads, pairs = config.n_heads if config.positions == "alibi" else 1, config.rotated // 2
    position_inputs = {
        "positions": TensorSpec("positions", (1, length), "int64"),
        "cos": TensorSpec("cos", (1, length, pairs), "float32"),
        "sin": TensorSpec("sin", (1, length, pairs), "float32"),
    }
    for layer, capacity in enumerate(capacities):
        mask = mask_name(config, layer)
        position_inputs[mask] = TensorSpec(mask, (heads, length, capacity + length), "float32")

    def rows(role: str, positions: Sequence[int]) -> list[TensorSpec]:
        shapes = [(config.n_kv_heads, count, config.head_dim) for count in positions]
        return [TensorSpec(f"{role}.{layer}", shape, "float32") for layer, shape in enumerate(shapes)]

    inputs = [TensorSpec("tokens", (1, length), "int64"), *(position_inputs[role] for role in names(config))]
    inputs += [TensorSpec("select", (1, length), "float32")]
    outputs = [TensorSpec("logits", (1, config.vocab_size), "float32")]
    if options.kv_cache:
        inputs += [*rows("k_cache", capacities), *rows("v_cache", capacities)]
        outputs += [*rows("k_rows", [length] * config.n_layers), *rows("v_rows", [length] * config.n_layers)]
    if options.hidden_states:
        outputs += [TensorSpec("hidden", (1, length, config.dim), "float32")]
    return MethodSpec(
        name=name,
        min_length=length,
        max_length=length,
        rows=1,
        start_layer=0,
        end_layer=config.n_layers,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _capacity(config: ModelConfig, layer: int, options: GraphOptions) -> int:
    """Of a block's cache: a local block's is a ring of the window's size."""
    if not options.kv_cache:
        return 0
    window = config.sliding_window if config.is_local(layer) else None
    return min(options.max_seq_len, window or options.max_seq_len)


def step(model: Llama, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Runs the model on inputs by the names of a `signature`, and returns its outputs by theirs."""
    config, layers = model.config, range(model.config.n_layers)
    angles = (inputs["cos"], inputs["sin"]) if "cos" in inputs else None
    masks = [inputs[mask_name(config, layer)] for layer in layers]
    caches = [[inputs[f"{kind}_cache.{layer}"] for layer in layers] for kind in "kv" if f"{kind}_cache.0" in inputs]
    found = model(inputs["tokens"], angles, masks, inputs["select"], *caches, positions=inputs.get("positions"))
    return {
        "logits": found.logits,
        **{f"k_rows.{layer}": rows for layer, rows in enumerate(found.k_rows)},
        **{f"v_rows.{layer}": rows for layer, rows in enumerate(found.v_rows)},
        "hidden": found.hidden,
    }


class _Flat(nn.Module):
    """The model with the flat arguments and results of a `signature`."""

    def __init__(self, model: Llama, spec: MethodSpec) -> None:
        super().__init__()
        self.model = model
        self.inputs = [tensor.name for tensor in spec.inputs]
        self.outputs = [tensor.name for tensor in spec.outputs]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        found = step(self.model, dict(zip(self.inputs, tensors, strict=True)))
        return [found[name] for name in self.outputs]


class _FlatPiece(nn.Module):
    """A block or the head with flat arguments: x, cos and sin if the model has them, and the others in their order."""

    def __init__(self, module: nn.Module, rotated: bool) -> None:
        super().__init__()
        self.module = module
        self.rotated = rotated

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.module, Head):
            return self.module(x, *others)
        angles, rest = (others[:2], others[2:]) if self.rotated else (None, others)
        return self.module(x, angles, *rest)


def _example(spec: TensorSpec) -> Tensor:
    return torch.zeros([size for size in spec.shape if isinstance(size, int)], dtype=getattr(torch, spec.dtype))
