"""Tracing of the eager model to one torch.export graph per method, and the signatures of the methods."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.weights.formats.format import Format
from export.weights.scheme import Scheme
from export.weights.source import linear_layers
from model.config import ModelConfig
from model.fused_attention import FusedLlama, Segment
from model.kv_row_format import row_width
from model.model import Block, BlockCache, Head, Llama
from model.tensor_parallel import Attend, Embed, Merge, SlicedLlama
from preproc.position_inputs import mask_name, names
from runtime.pte.metadata import CACHES, K_CACHE, K_ROWS, ROWS, STREAM, V_ROWS, MethodSpec, TensorSpec, of_layer


@dataclass(frozen=True)
class GraphOptions:
    """Options that determine the inputs and outputs of the graphs.

    Attributes:
        max_seq_len: maximum number of positions in a text, and the capacity of the caches (T). In local blocks, the
            capacity is at most the window.
        prefill_chunk: number of tokens (L) of `prefill`; with 1, there is no such method.
        attention: "aten" for plain operators on whole caches, in a static graph that every backend supports; or "fused"
            for one operator that reads only the filled part of the caches, in one method for any number of tokens.
        kv_cache: whether the methods take and extend caches; otherwise each step takes the whole text.
        hidden_states: whether the methods also return the normalised output of the last block.
        batch_size: number of texts that a step extends at once (B), each at its own position; more than 1 requires
            fused attention.
        max_rows: maximum number of rows of logits that a step returns for each text; more than 1 requires fused
            attention.
    """

    max_seq_len: int
    prefill_chunk: int
    attention: str = "aten"
    kv_cache: bool = True
    hidden_states: bool = False
    batch_size: int = 1
    max_rows: int = 1


def trace(model: Llama | FusedLlama | SlicedLlama, methods: Iterable[MethodSpec]) -> dict[str, ExportedProgram]:
    """Traces the whole model to one graph per method; of a slice, each half. See tests/bench/NOTES.md for alternatives.

    Parts of the model may already be lowered. They become calls in the graph.
    """
    return {spec.name: _export(_Flat(model, spec), spec.inputs, spec) for spec in methods}


def pieces(config: ModelConfig, span: range, fused: bool) -> dict[str, str]:
    """Returns the parts of a shard that a backend can take as one. The result maps names to kinds, which are equal for
    pieces that differ only in their weights and the formats of these.

    Args:
        span: the shard's blocks.
        fused: whether attention is a separate operator between segments.
    """
    found = dict[str, str]()
    for number in range(span.start, span.stop + fused):
        before, after = fused and number > span.start, number < span.stop
        ends = number == config.n_layers
        if fused:
            kind = {"before": before, "after": after, "head": ends}
        else:
            local, unrotated = config.is_local(number), number in config.nope_layers
            kind = {"block": True, "local": local, "unrotated": unrotated}
        found[f"{'segments' if fused else 'layers'}.{number}"] = " ".join(name for name in kind if kind[name])
    return found if fused or span.stop < config.n_layers else found | {"head": "head"}


def half_pieces(config: ModelConfig) -> dict[str, str]:
    """Returns the pieces of a slice, with attention as a separate operator; see `pieces`."""
    found = dict[str, str]()
    for layer in range(config.n_layers):
        found |= {f"attend.{layer}.project": "project", f"attend.{layer}.merge": "merge", f"feed.{layer}": "feed"}
    return found | {"head": "head"}


def kinds(config: ModelConfig, spec: MethodSpec, scheme: Scheme) -> dict[str, str]:
    """Returns the pieces that a method runs, as `pieces` does, except that pieces of one kind also have their weights
    in the same formats. A kind ends with the matrices whose formats are among the scheme's `others`.
    """
    found = half_pieces(config) if spec.slices > 1 else pieces(config, spec.span, spec.is_fused)
    model, plain = unweighted(config, spec), replace(scheme, others={})
    for name in found:
        usual = formats(config, name, model, plain)
        for path, form in formats(config, name, model, scheme).items():
            if form != usual[path]:
                found[name] += f", {path} in {form}"
    return found


def unweighted(config: ModelConfig, spec: MethodSpec) -> nn.Module:
    """Returns the model of which the pieces that a method runs are submodules, without weights."""
    with torch.device("meta"):
        model = Llama(config, spec.span)
        if spec.slices > 1:
            return SlicedLlama(model, 0)
        return FusedLlama(model) if spec.is_fused else model


def formats(config: ModelConfig, piece: str, model: nn.Module, scheme: Scheme) -> dict[str, Format]:
    """Returns the formats of the matrices that a piece of `model` multiplies by, by the paths of their layers in it."""
    return {
        path: scheme.format(parameter_name(config, piece, f"{path}.weight"), layer.in_features)
        for path, layer in linear_layers(model.get_submodule(piece))
        if _runs(piece, path)
    }


def _runs(piece: str, path: str) -> bool:
    """Returns whether a piece runs a linear layer below it, by its path. Halves of blocks have the whole blocks."""
    projects = path.endswith((".wq", ".wk", ".wv"))
    if piece.startswith("segments."):
        return path == "after.output" or projects == path.startswith("after.")
    if piece.startswith("attend."):
        return projects if piece.endswith(".project") else path.endswith(".wo")
    return not piece.startswith("feed.") or ".feed_forward." in path


def parameter_name(config: ModelConfig, piece: str, role: str) -> str:
    """Returns the name in the model of a piece's parameter, such as layers.3.attention.wo.weight."""
    if piece.startswith(("attend.", "feed.")):
        return f"layers.{piece.split('.')[1]}.{role.removeprefix('block.')}"
    if not piece.startswith("segments."):
        return f"{piece}.{role}"
    side, role = role.split(".", 1)
    layer = int(piece.removeprefix("segments.")) - (side == "before")
    return f"head.{role}" if layer == config.n_layers else f"layers.{layer}.{role}"


def trace_piece(config: ModelConfig, name: str, module: nn.Module, spec: MethodSpec) -> ExportedProgram:
    """Traces one of `pieces`, with the shapes that it has in the method `spec`.

    Args:
        module: the Block, Head, Segment, Project, Merge or Feed.
    """
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    stream = inputs["tokens" if "tokens" in inputs else STREAM].shape[:2]
    taken = [] if isinstance(module, Merge) else [TensorSpec("x", (*stream, config.dim), "float32")]
    if isinstance(module, Merge) or (isinstance(module, Segment) and module.before):
        taken += [TensorSpec("out", (*stream, config.n_heads * config.head_dim), "float32")]
    if isinstance(module.after if isinstance(module, Segment) else module, Head):
        taken += [inputs["select"]]
    if isinstance(module, Block):
        layer = int(name.removeprefix("layers."))
        wanted = ("cos", "sin", mask_name(config, layer), *(of_layer(role, layer) for role in CACHES))
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
    """Returns the dynamic_shapes argument of torch.export for a module whose forward takes *name: each tensor's axes of
    variable size. None if all sizes are fixed.
    """
    axes = [{axis: size for axis, size in enumerate(tensor.shape) if isinstance(size, str)} for tensor in inputs]
    if not any(axes):
        return None
    ranges = {"L": (spec.min_length, spec.max_length), "R": (1, spec.max_rows)}
    used = {size for found in axes for size in found.values()}
    sizes = {size: torch.export.Dim(size, min=ranges[size][0], max=ranges[size][1]) for size in used}
    return {name: tuple({axis: sizes[size] for axis, size in found.items()} for found in axes)}


def signatures(
    config: ModelConfig, options: GraphOptions, kv_dtype: str = "float32", span: range | None = None
) -> tuple[MethodSpec, ...]:
    """Returns the methods of a model or shard.

    With plain attention, these are `decode` (one token) and, unless the chunk is one token, `prefill` (prefill_chunk
    tokens). With fused attention there is only `forward` (1 to prefill_chunk tokens), and without caches only `forward`
    (max_seq_len tokens). All methods return the logits of one row of each text; with fused attention, of up to
    max_rows.

    Args:
        span: the blocks of a shard, or None for the whole model. A shard that does not contain the beginning or end of
            the model takes or returns the stream [B, L, D] between blocks instead.
    """
    if options.attention == "fused" or not options.kv_cache:
        lengths = {"forward": options.prefill_chunk if options.kv_cache else options.max_seq_len}
    else:
        lengths = {"decode": 1} | ({"prefill": options.prefill_chunk} if options.prefill_chunk > 1 else {})
    return tuple(signature(config, name, length, options, kv_dtype, span) for name, length in lengths.items())


def signature(
    config: ModelConfig,
    name: str,
    length: int,
    options: GraphOptions,
    kv_dtype: str = "float32",
    span: range | None = None,
) -> MethodSpec:
    """Returns one method of `signatures`, for `length` tokens; with fused attention, for 1 to `length` tokens."""
    span = range(config.n_layers) if span is None else span
    is_fused = options.attention == "fused" and options.kv_cache
    B = options.batch_size
    L = _length(length, is_fused)
    max_rows = min(options.max_rows, length) if is_fused else 1
    R: int | Literal["R"] = "R" if max_rows > 1 else 1
    stream = TensorSpec(STREAM, (B, L, config.dim), "float32")

    def rows(role: str, counts: Sequence[int | Literal["L"]]) -> list[TensorSpec]:
        shapes = [(B * config.n_kv_heads, count, row_width(config.head_dim, kv_dtype)) for count in counts]
        return [TensorSpec(of_layer(role, layer), shape, kv_dtype) for layer, shape in zip(span, shapes, strict=True)]

    inputs = [TensorSpec("tokens", (B, L), "int64") if span.start == 0 else stream]
    inputs += _position_inputs(config, span, length, options, is_fused)
    outputs = list[TensorSpec]()
    if span.stop == config.n_layers:
        inputs += [TensorSpec("select", (B, R, L), "float32")]
        outputs += [TensorSpec("logits", (B, R, config.vocab_size), "float32")]
    else:
        outputs += [stream]
    if options.kv_cache:
        capacities = [config.slots(layer, options.max_seq_len) for layer in span]
        inputs += [spec for role in CACHES for spec in rows(role, capacities)]
        outputs += [spec for role in ROWS for spec in rows(role, [L] * len(span))]
    if options.hidden_states and span.stop == config.n_layers:
        outputs += [TensorSpec("hidden", (B, L, config.dim), "float32")]
    return MethodSpec(
        name=name,
        min_length=1 if is_fused else length,
        max_length=length,
        max_rows=max_rows,
        start_layer=span.start,
        end_layer=span.stop,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def _length(length: int, is_fused: bool) -> int | Literal["L"]:
    """Returns L as it is written in a shape: the symbol "L" if it is variable, otherwise the number."""
    return "L" if is_fused and length > 1 else length


def _position_inputs(
    config: ModelConfig, span: range, length: int, options: GraphOptions, is_fused: bool
) -> list[TensorSpec]:
    """Returns the position inputs that a shard's blocks take, see `preproc.position_inputs`."""
    B, L = options.batch_size, _length(length, is_fused)
    pairs = config.rotated // 2 * (1 if config.local_rope_theta is None else 2)
    found = {
        "positions": TensorSpec("positions", (B, L), "int64"),
        "cos": TensorSpec("cos", (B, L, pairs), "float32"),
        "sin": TensorSpec("sin", (B, L, pairs), "float32"),
        "start": TensorSpec("start", (B,), "int64"),
    }
    heads = config.n_heads if config.positions == "alibi" else 1
    for layer in span:
        mask = mask_name(config, layer)
        capacity = config.slots(layer, options.max_seq_len) if options.kv_cache else 0
        found[mask] = TensorSpec(mask, (heads, length, capacity + length), "float32")
    return [found[name] for name in names(config, is_fused, span)]


def step(model: Llama | FusedLlama, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Runs the model on inputs named as in a `signature`, and returns its outputs by name."""
    span, select, positions = model.span, inputs.get("select"), inputs.get("positions")
    x = inputs["tokens" if model.begins else STREAM]
    angles = (inputs["cos"], inputs["sin"]) if "cos" in inputs else None
    cached = of_layer(K_CACHE, span.start) in inputs
    caches = [BlockCache(*(inputs[of_layer(role, layer)] for role in CACHES)) for layer in span] if cached else None
    if isinstance(model, FusedLlama):
        found = model(x, angles, inputs["start"], select, caches, positions)
    else:
        masks = [inputs[mask_name(model.config, layer)] for layer in span]
        found = model(x, angles, masks, select, caches, positions)
    others = {"logits": found.logits, "hidden": found.hidden, STREAM: found.stream}
    return {
        **{of_layer(K_ROWS, layer): rows for layer, rows in zip(span, found.k_rows, strict=True)},
        **{of_layer(V_ROWS, layer): rows for layer, rows in zip(span, found.v_rows, strict=True)},
        **{name: value for name, value in others.items() if value is not None},
    }


def half_step(half: nn.Module, layer: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Runs a half of a slice, of block `layer`, on inputs by name, and returns its outputs by name."""
    if isinstance(half, Embed):
        return {STREAM: half(inputs["tokens"], inputs.get("positions"))}
    stream = inputs[STREAM]
    if isinstance(half, Attend):
        angles = (inputs["cos"], inputs["sin"]) if "cos" in inputs else None
        caches = (inputs[of_layer(role, layer)] for role in CACHES)
        part, k_rows, v_rows = half(stream, angles, inputs["start"], *caches)
        return {STREAM: part, of_layer(K_ROWS, layer): k_rows, of_layer(V_ROWS, layer): v_rows}
    if "select" in inputs:
        logits, hidden = half(stream, inputs["select"])
        return {"logits": logits, "hidden": hidden}
    (part,) = half(stream)
    return {STREAM: part}


class _Flat(nn.Module):
    """A wrapper of the model, or of a half of a slice, with the flat arguments and results of a `signature`."""

    def __init__(self, model: Llama | FusedLlama | SlicedLlama, spec: MethodSpec) -> None:
        super().__init__()
        self.model = model.get_submodule(spec.half)
        self.layer = spec.start_layer
        self.inputs = [tensor.name for tensor in spec.inputs]
        self.outputs = [tensor.name for tensor in spec.outputs]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        inputs = dict(zip(self.inputs, tensors, strict=True))
        if isinstance(self.model, Llama | FusedLlama):
            found = step(self.model, inputs)
        else:
            found = half_step(self.model, self.layer, inputs)
        return [found[name] for name in self.outputs]


class _FlatPiece(nn.Module):
    """A wrapper of a piece with flat arguments. A block takes x, then cos and sin if it has them, then its other
    arguments.
    """

    def __init__(self, module: nn.Module, rotated: bool) -> None:
        super().__init__()
        self.module = module
        self.rotated = rotated

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(self.module, Block):
            return self.module(*tensors)
        x, *others = tensors
        angles, (mask, *cache) = (tuple(others[:2]), others[2:]) if self.rotated else (None, others)
        return self.module(x, angles, mask, BlockCache(*cache) if cache else None)
