"""WeightSource, which provides the weights of a model piece by piece, so that the whole model is never in memory."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from export.checkpoints.checkpoint import StoredBlocks
from export.weights.formats.blocks import Blocks
from export.weights.formats.chosen_experts import choose_experts
from export.weights.formats.float32 import FLOAT
from export.weights.formats.format import Format
from export.weights.scheme import Scheme, is_shared, matrices
from model.config import ModelConfig
from model.fused_attention import FusedLlama
from model.model import Block, Llama
from model.tensor_parallel import columns


class WeightSource:
    """A model's dimensions, its weights on storage, and their formats in the exported file.

    Attributes:
        config: dimensions and features of the model.
        scheme: storage formats of the weights.
        slices: number of slices into which the model is divided. Each slice quantises its activations separately.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        scheme: Scheme,
        calibrated: Mapping[str, Tensor] | None = None,
        slices: int = 1,
        blocks: Mapping[str, StoredBlocks] | None = None,
    ) -> None:
        """Takes the model's parameters, the matrices that `export.quality.gptq` has calibrated, and those that the
        checkpoint has in blocks, by name.
        """
        self.config = config
        self.scheme = scheme
        self.slices = slices
        self._weights = weights
        self._calibrated = calibrated or {}
        self._blocks = blocks or {}

    def weight(self, name: str) -> Tensor:
        """Returns a parameter of the model, read from storage, in the checkpoint's dtype."""
        return self._weights[self._stored_name(name)]

    def _stored_name(self, name: str) -> str:
        return "tok_embeddings.weight" if self.config.tied and name == "head.output.weight" else name

    def stored(self, name: str) -> Tensor:
        """Returns a parameter as its format stores it."""
        if self.is_calibrated(name):
            return self._calibrated[name]
        if blocks := self._kept(name):
            return blocks.read()
        return self.format(name).stored(self.weight(name), self.scheme.plain_rounding)

    def _kept(self, name: str) -> StoredBlocks | None:
        """Returns the blocks that a checkpoint has for a matrix, if they are of the matrix's format."""
        blocks = self._blocks.get(self._stored_name(name))
        return blocks if blocks and self.format(name) == Blocks.of(blocks.kind) else None

    def format(self, name: str) -> Format:
        """Returns the storage format of a parameter: the scheme's for matrices, float32 for all others."""
        return self.scheme.format(name, self.matrices[name][1]) if name in self.matrices else FLOAT

    @functools.cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Names and shapes of all matrices that can be quantised."""
        return matrices(self.config) | {"tok_embeddings.weight": (self.config.vocab_size, self.config.dim)}

    def parts(self, name: str) -> list[tuple[str, Tensor]]:
        """Returns the data to which a lowered piece refers by name for one of its parameters, see `Format.parts`."""
        return self.format(name).parts(self.stored(name))

    def is_calibrated(self, name: str) -> bool:
        """Returns whether `export.quality.gptq` calibrates a matrix. The embedding is not calibrated, nor is a head
        that shares its matrix, nor is what the checkpoint has in blocks of the same format.
        """
        tables = ["tok_embeddings.weight"] + ["head.output.weight"] * is_shared(self.config, self.scheme)
        is_alone = name not in tables and not self._kept(name)
        return self.scheme.is_calibrated and self.format(name).can_calibrate and is_alone

    def with_scheme(self, scheme: Scheme) -> "WeightSource":
        """Returns a source of the same model with another scheme."""
        return WeightSource(self.config, self._weights, scheme, slices=self.slices, blocks=self._blocks)

    def with_calibrated(self, matrices: Mapping[str, Tensor]) -> "WeightSource":
        """Returns the same source with calibrated matrices, by name."""
        return WeightSource(self.config, self._weights, self.scheme, matrices, self.slices, self._blocks)

    def unquantised(self) -> "WeightSource":
        """Returns a source of the same model in float32."""
        return self.with_scheme(Scheme())

    def piece(self, name: str) -> nn.Module:
        """Returns a part of the model (tok_embeddings, layers.0, head) with its weights in the scheme's formats."""
        weight = f"{name}.weight"
        if name == "tok_embeddings":
            return self.format(weight).embedding(self.stored(weight), self.config.dim)
        widths, piece = columns(self.config, self.slices), self.frame(name)
        for path, layer in linear_layers(piece):
            weight = f"{name}.{path}.weight"
            width = widths.get(path.rpartition(".")[2])
            piece.set_submodule(path, self.format(weight).linear(self.stored(weight), layer.bias, width))
        choose_experts(piece)
        return piece.eval().requires_grad_(False)

    def frame(self, name: str) -> nn.Module:
        """Returns a part of the model with its weights in float32, but without the matrices of its linear layers."""
        with torch.device("meta"):
            piece = Llama(self.config).get_submodule(name)
        matrices = {f"{path}.weight" for path, _ in linear_layers(piece)}
        rest = {role: self.weight(f"{name}.{role}").float() for role in piece.state_dict() if role not in matrices}
        piece.load_state_dict(rest, strict=False, assign=True)
        if isinstance(piece, Block):
            piece.attention.kv_dtype = self.scheme.kv_dtype
        return piece.eval().requires_grad_(False)

    def model(self, made: Mapping[str, nn.Module], span: range | None = None) -> Llama:
        """Builds the model, or a shard of it, from modules for its `piece_names`, which may be lowered."""
        with torch.device("meta"):
            model = Llama(self.config, span)
        for name in made:
            model.set_submodule(name, made[name])
        return model.eval()

    def fused(self, made: Mapping[str, nn.Module], span: range | None = None) -> FusedLlama:
        """Builds the model with fused attention, from modules for `piece_names`, or for embeddings and segments."""
        segments = {name for name in made if name.startswith("segments.")}
        model = FusedLlama(self.model({name: made[name] for name in made.keys() - segments}, span))
        for name in segments:
            model.set_submodule(name, made[name])
        return model.eval()

    def streamed(self) -> Llama:
        """Returns the whole model, in which each piece is read when it is run and discarded afterwards."""
        names = piece_names(self.config)
        made = {name: _OnDemand(lambda name=name: self.piece(name)) for name in names}  # type: ignore[misc]
        return self.model(made)


def embedding_names(config: ModelConfig, span: range | None = None) -> list[str]:
    """Returns the names of the embeddings, and of their norm, in a model or shard. No backend takes them."""
    if span is not None and span.start > 0:
        return []
    others = {"pos_embeddings": config.positions == "learned", "embedding_norm": config.embedding_norm}
    return ["tok_embeddings", *(name for name, is_there in others.items() if is_there)]


def piece_names(config: ModelConfig, span: range | None = None) -> list[str]:
    """Returns the names of all parts of a model or shard."""
    span = range(config.n_layers) if span is None else span
    head = ["head"] if span.stop == config.n_layers else []
    return [*embedding_names(config, span), *(f"layers.{layer}" for layer in span), *head]


def linear_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Returns the linear layers below a module, with their paths, such as attention.wq."""
    return [(path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Linear)]


class _OnDemand(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.make = make

    def forward(self, *arguments: object) -> object:
        return self.make()(*arguments)
