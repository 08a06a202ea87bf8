"""WeightSource: the weights that make a model, piece by piece, so that it never has to be in memory as a whole."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.weights.quantize import QuantizedEmbedding, quantize, stored
from export.weights.scheme import CALIBRATED, Scheme, is_shared
from model.config import ModelConfig
from model.fused_attention import FusedLlama
from model.model import Block, Llama
from model.tensor_parallel import columns


class WeightSource:
    """Dimensions, weights on storage, and how they are to be stored in the file.

    Attributes:
        config: the model's dimensions.
        scheme: how weights are stored and multiplied.
        slices: into so many the model is dealt out, each of which rounds its activations by itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        scheme: Scheme,
        calibrated: Mapping[str, Tensor] | None = None,
        slices: int = 1,
    ) -> None:
        """Takes the model's parameters, and matrices that `export.quality.gptq` has rounded, by their names."""
        self.config = config
        self.scheme = scheme
        self.slices = slices
        self._weights = weights
        self._calibrated = calibrated or {}

    def weight(self, name: str) -> Tensor:
        """A parameter of the model, read from storage, in the checkpoint's dtype."""
        tied = self.config.tied and name == "head.output.weight"
        return self._weights["tok_embeddings.weight" if tied else name]

    def stored(self, name: str) -> Tensor:
        """A matrix as the scheme has it: float32, or torchao's integers and scales."""
        if self.is_calibrated(name):
            return self._calibrated[name]
        weight = self.weight(name)
        return stored(weight, self.scheme.format(name, weight.shape[1]), self.scheme.plain_rounding)

    def is_calibrated(self, name: str) -> bool:
        """Whether `export.quality.gptq` rounds a matrix: not the embedding, nor a head stored with it as one."""
        if name == "head.output.weight":
            form, is_alone = self.scheme.head, not is_shared(self.config, self.scheme)
        else:
            form, is_alone = self.scheme.linear, name != "tok_embeddings.weight"
        return self.scheme.rounding == CALIBRATED and form.bits is not None and is_alone

    def with_scheme(self, scheme: Scheme) -> "WeightSource":
        """The same model, stored in another way."""
        return WeightSource(self.config, self._weights, scheme, slices=self.slices)

    def with_calibrated(self, matrices: Mapping[str, Tensor]) -> "WeightSource":
        """The same with these, by name, for the matrices that are calibrated."""
        return WeightSource(self.config, self._weights, self.scheme, matrices, self.slices)

    def unquantised(self) -> "WeightSource":
        """The same model in float32."""
        return self.with_scheme(Scheme())

    def piece(self, name: str) -> nn.Module:
        """A part of the model with its weights, as the scheme has them: tok_embeddings, layers.0, head."""
        if name == "tok_embeddings":
            return _embedding(self.stored("tok_embeddings.weight"))
        widths = columns(self.config, self.slices)
        made = quantize(self.frame(name), lambda role: self.stored(f"{name}.{role}"), widths)
        return made.eval().requires_grad_(False)

    def frame(self, name: str) -> nn.Module:
        """A part of the model with its weights in float32, but for the linear layers' matrices, which it lacks."""
        with torch.device("meta"):
            piece = Llama(self.config).get_submodule(name)
        matrices = {f"{role}.weight" for role, layer in piece.named_modules() if isinstance(layer, nn.Linear)}
        rest = {role: self.weight(f"{name}.{role}").float() for role in piece.state_dict() if role not in matrices}
        piece.load_state_dict(rest, strict=False, assign=True)
        if isinstance(piece, Block):
            piece.attention.kv_dtype = self.scheme.kv_dtype
        return piece.eval().requires_grad_(False)

    def model(self, made: Mapping[str, nn.Module], span: range | None = None) -> Llama:
        """The model, or a shard of it, of `piece_names` that are made already, and may be lowered."""
        with torch.device("meta"):
            model = Llama(self.config, span)
        for name in made:
            model.set_submodule(name, made[name])
        return model.eval()

    def fused(self, made: Mapping[str, nn.Module], span: range | None = None) -> FusedLlama:
        """The same with attention as an operator, of such pieces, or of embeddings and segments."""
        segments = {name for name in made if name.startswith("segments.")}
        model = FusedLlama(self.model({name: made[name] for name in made.keys() - segments}, span))
        for name in segments:
            model.set_submodule(name, made[name])
        return model.eval()

    def streamed(self) -> Llama:
        """The whole model, each piece of which is read when it is run, and then forgotten."""
        names = piece_names(self.config)
        made = {name: _OnDemand(lambda name=name: self.piece(name)) for name in names}  # type: ignore[misc]
        return self.model(made)


def embedding_names(config: ModelConfig, span: range | None = None) -> list[str]:
    """Of those parts of a model, or of a shard of it, that no backend takes."""
    if span is not None and span.start > 0:
        return []
    return ["tok_embeddings"] + ["pos_embeddings"] * (config.positions == "learned")


def piece_names(config: ModelConfig, span: range | None = None) -> list[str]:
    """Of all parts of a model, or of a shard of it."""
    span = range(config.n_layers) if span is None else span
    head = ["head"] if span.stop == config.n_layers else []
    return [*embedding_names(config, span), *(f"layers.{layer}" for layer in span), *head]


def _embedding(weight: Tensor) -> nn.Module:
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        return QuantizedEmbedding(weight)
    embedding = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    return embedding


class _OnDemand(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.make = make

    def forward(self, *arguments: object) -> object:
        return self.make()(*arguments)
