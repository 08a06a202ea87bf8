"""Mixtures of experts with weights in blocks, of which a step reads only the experts that its tokens choose."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.weights.formats.blocks import BlockLinear
from model.model import Experts, FeedForward
from model.norm import last_mean


class ChosenExperts(nn.Module):
    """A mixture of experts that computes only the experts that each token chooses. It shares the modules of the mixture
    that it is built from, whose experts have weights in blocks.
    """

    def __init__(self, mixture: Experts) -> None:
        super().__init__()
        self.count = int(mixture.chosen)
        self.router = mixture.router
        self.experts = mixture.experts

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, L, D] to [B, L, D]."""
        B, _, D = x.shape
        shares, chosen = torch.topk(F.softmax(self.router(x), dim=-1), self.count)  # [B, L, k]
        expert = cast(FeedForward, self.experts[0])
        hidden = expert.activation(self._product("w1", x, chosen))  # [B, L, k, F]
        if expert.w3 is not None:
            hidden = hidden * self._product("w3", x, chosen)
        out = self._product("w2", hidden, chosen)
        shares = shares / (last_mean(shares) * float(self.count))
        return torch.bmm(shares.view(-1, 1, self.count), out.view(-1, self.count, D)).view(B, -1, D)

    def _product(self, role: str, x: Tensor, chosen: Tensor) -> Tensor:
        """Multiplies x, [B, L, K] or [B, L, k, K], by the chosen experts' matrices of a role, and returns [B, L, k,
        N]. In an export, only the shapes of weights matter.
        """
        layers = [cast(BlockLinear, expert.get_submodule(role)) for expert in self.experts]
        weights, kind = [cast(Tensor, layer.weight) for layer in layers], layers[0].kind
        assert {(layer.kind, layer.bias) for layer in layers} == {(kind, None)}, f"{role} has several types, or a bias"
        rows = len(weights[0])
        if torch.compiler.is_exporting():
            out: Tensor = torch.ops.llama_pte.expert_linear(x, weights, chosen, kind, rows)
            return out
        if x.dim() == chosen.dim():
            x = x.unsqueeze(2).expand(*chosen.shape, -1)
        out = x.new_empty(*chosen.shape, rows)
        for number, layer in enumerate(layers):
            here = chosen == number
            out[here] = layer(x[here])
        return out


def choose_experts(module: nn.Module) -> None:
    """Replaces each mixture of experts with weights in blocks below a module by `ChosenExperts`."""
    for path, mixture in list(module.named_modules()):
        if isinstance(mixture, Experts) and all(isinstance(layer, BlockLinear) for layer in _layers(mixture)):
            module.set_submodule(path, ChosenExperts(mixture))


def _layers(mixture: Experts) -> list[nn.Module]:
    """Returns the linear layers of all experts."""
    return [
        layer for expert in mixture.experts for name, layer in expert.named_children() if name in ("w1", "w2", "w3")
    ]
