"""Recipe: what a model is put together from, piece by piece, so that it never has to be in memory as a whole."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from export.quantize import Scheme, quantize
from model.config import ModelConfig
from model.model import Llama


class Recipe:
    """Dimensions, weights on storage, and how they are to be stored in the file.

    Attributes:
        config: the model's dimensions.
        scheme: how weights are stored and multiplied.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], scheme: Scheme) -> None:
        self.config = config
        self.scheme = scheme
        self._weights = weights

    def weight(self, name: str) -> Tensor:
        """A parameter of the model, read from storage, in the checkpoint's dtype."""
        tied = self.config.tied and name == "head.output.weight"
        return self._weights["tok_embeddings.weight" if tied else name]

    def unquantised(self) -> "Recipe":
        """The same model in float32."""
        return Recipe(self.config, self._weights, Scheme())

    def piece(self, name: str) -> nn.Module:
        """A part of the model with its weights, as the scheme has them: tok_embeddings, layers.0, head."""
        with torch.device("meta"):
            piece = Llama(self.config).get_submodule(name)
        if name == "tok_embeddings":
            return self.scheme.embedding(self.weight("tok_embeddings.weight"))
        matrices = {f"{role}.weight" for role, layer in piece.named_modules() if isinstance(layer, nn.Linear)}
        state = {role: self.weight(f"{name}.{role}") for role in piece.state_dict()}
        state = {role: value if role in matrices else value.float() for role, value in state.items()}
        piece.load_state_dict(state, assign=True)
        return quantize(piece, self.scheme).eval().requires_grad_(False)

    def model(self, made: Mapping[str, nn.Module]) -> Llama:
        """The whole model of `piece_names` that are made already, and may be lowered."""
        with torch.device("meta"):
            model = Llama(self.config)
        for name in piece_names(self.config):
            model.set_submodule(name, made[name])
        return model.eval()

    def streamed(self) -> Llama:
        """The whole model, each piece of which is read when it is run, and then forgotten."""
        names = piece_names(self.config)
        return self.model({name: _OnDemand(lambda name=name: self.piece(name)) for name in names})  # type: ignore[misc]


def piece_names(config: ModelConfig) -> list[str]:
    """Of all parts of a model."""
    embeddings = ["tok_embeddings"] + ["pos_embeddings"] * (config.positions == "learned")
    return [*embeddings, *(f"layers.{layer}" for layer in range(config.n_layers)), "head"]


class _OnDemand(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.make = make

    def forward(self, *arguments: object) -> object:
        return self.make()(*arguments)
