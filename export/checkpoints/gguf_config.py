"""Conversion of a GGUF file's fields to ModelConfig, by the table of architectures."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.checkpoints.families import FAMILIES
from export.checkpoints.family import Settings, value_of
from export.checkpoints.gguf_families import (
    ARCHITECTURES,
    BASE,
    DEFAULTS,
    KEYS,
    PATTERN,
    WINDOW,
    Architecture,
)
from export.checkpoints.gguf_file import GGUFTensor
from model.config import ModelConfig, RopeScaling
from model.errors import InputError, listed
from model.rotary import llama3_scaled

_ROPE_FACTORS, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = {_ROPE_FACTORS, _SHORT, _LONG}
"""Tensors that set the rotary frequencies."""


def architecture_of(fields: Mapping[str, Any], path: Path) -> Architecture:
    """Returns the architecture that a file names.

    Raises:
        InputError: it is not in the table.
    """
    name = fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise InputError(
            f"{path} has the unsupported architecture {name!r}; give a file with one of "
            f"{listed(ARCHITECTURES, len(ARCHITECTURES))}, or the unconverted checkpoint"
        )
    return ARCHITECTURES[name]


def settings_of(fields: Mapping[str, Any], tensors: Mapping[str, GGUFTensor], path: Path) -> dict[str, Any]:
    """Returns the fields of the file's architecture without its name, with the values of omitted ones, and the shapes
    of the tensors.

    Raises:
        InputError: a field has a value that would change the result in a way that is not implemented.
    """
    architecture, prefix = architecture_of(fields, path), f"{fields['general.architecture']}."
    own = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    for key, known in architecture.only.items():
        if own.get(key, known[0]) not in known:
            only = " or ".join(repr(value) for value in known)
            raise InputError(
                f"{path} sets {prefix}{key} to {own[key]!r}, which is unsupported; only {only} can be exported"
            )
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return {**DEFAULTS, **architecture.defaults, **own, **shapes}


def config_of(fields: Mapping[str, Any], tensors: Mapping[str, GGUFTensor], path: Path) -> ModelConfig:
    """Returns the ModelConfig described by a file's fields and tensors.

    Raises:
        InputError: a field is missing, damaged, or has a value that cannot be exported.
        ValueError: the dimensions are inconsistent.
    """
    architecture, settings = architecture_of(fields, path), settings_of(fields, tensors, path)
    try:
        found = {name: value_of(settings, key) for name, key in KEYS.items()}
        found |= {**FAMILIES[architecture.family].features, **architecture.features}
        found |= {name: value_of(settings, key) for name, key in architecture.keys.items()}
        local_theta = found.pop("local_rope_theta")
        kind = "" if found.get("norm") == "layer" else "rms_"
        found["norm_eps"] = settings[f"attention.layer_norm_{kind}epsilon"]
        found["n_kv_heads"] = found["n_kv_heads"] or found["n_heads"]
        found["head_dim"] = found["head_dim"] or found["dim"] // found["n_heads"]
        if found.get("positions", "rope") == "rope":
            found |= _rope(settings, tensors, found["head_dim"], path)
        config = ModelConfig(**found)
        layers = range(config.n_layers)
        local = tuple(layer for layer in layers if _is_local(settings, layer))
        rotated = config.positions == "rope"
        same = not rotated or (local_theta == config.rope_theta and config.rope_scaling is None)
        return replace(
            config,
            nope_layers=tuple(layer for layer in layers if not architecture.rotates(settings, layer, layer in local)),
            local_layers=local,
            sliding_window=settings[WINDOW] if local else None,
            local_rope_theta=None if same or not local else local_theta,
        )
    except KeyError as error:
        key = str(error.args[0])
        name = key if key.endswith(".weight") else f"{fields['general.architecture']}.{key}"
        raise InputError(f"{path} lacks the key '{name}'; convert the checkpoint again") from error
    except (TypeError, ZeroDivisionError, IndexError) as error:
        raise InputError(f"{path} has an invalid dimension ({error}); convert the checkpoint again") from error


def _is_local(settings: Settings, layer: int) -> bool:
    """Returns whether a block attends only to the window: as listed for each block, or all but one in n."""
    pattern = settings[PATTERN]
    if not settings[WINDOW]:
        return False
    return bool(pattern[layer] if isinstance(pattern, list) else not pattern or (layer + 1) % pattern)


def _rope(settings: Settings, tensors: Mapping[str, GGUFTensor], head_dim: int, path: Path) -> dict[str, Any]:
    """Returns the rotary fields of ModelConfig."""
    theta, rotated = float(settings[BASE]), settings.get("rope.dimension_count", head_dim)
    found = {"rope_theta": theta, "rotary_dim": None if rotated == head_dim else rotated}
    if _ROPE_FACTORS in tensors:
        return found | {"rope_scaling": _llama3(path, _values(tensors[_ROPE_FACTORS]), theta)}
    if _SHORT in tensors or settings.get("rope.scaling.type") == "longrope":
        return found | {"rope_scaling": _longrope(settings, tensors)}
    return found | {"rope_scaling": _scaling(path, settings)}


def _scaling(path: Path, settings: Settings) -> RopeScaling | None:
    """Returns the scaling given in the fields, under the current key or that of the first GGUF files, as llama.cpp
    does.

    Raises:
        InputError: the fields give another kind of scaling.
    """
    factor = float(settings.get("rope.scaling.factor") or settings.get("rope.scale_linear") or 1)
    kind, context = settings.get("rope.scaling.type", "linear"), settings["context_length"]
    if kind not in ("none", "linear", "yarn"):
        raise InputError(
            f"{path} has the unsupported rope scaling {kind!r}; give a file with linear, yarn, longrope or Llama 3.1's"
        )
    if kind == "none" or factor == 1:
        return None
    if kind == "linear":
        return RopeScaling("linear", factor, original_context=context)
    return RopeScaling(
        "yarn",
        factor,
        original_context=settings.get("rope.scaling.original_context_length", context),
        beta_fast=settings.get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=settings.get("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=settings.get("rope.scaling.yarn_attn_factor"),
    )


def _longrope(settings: Settings, tensors: Mapping[str, GGUFTensor]) -> RopeScaling:
    """Returns LongRoPE's scaling, whose divisors are two tensors."""
    context = settings["context_length"]
    original = settings.get("rope.scaling.original_context_length", context)
    return RopeScaling(
        "longrope",
        max(1.0, context / original),
        original_context=original,
        attention_factor=settings.get("rope.scaling.attn_factor", 1.0),
        short_factors=tuple(_values(tensors[_SHORT]).tolist()),
        long_factors=tuple(_values(tensors[_LONG]).tolist()),
    )


def _llama3(path: Path, divisors: torch.Tensor, theta: float) -> RopeScaling:
    """Returns Llama 3.1's scaling, which GGUF stores as a divisor of each frequency, [Dh/2], from 1 to the factor.

    Raises:
        InputError: the divisors are not those of Llama 3.1's formula.
    """
    scaling = RopeScaling("llama3", float(divisors.max()), original_context=8192)
    pairs = len(divisors)
    frequencies = theta ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
    if not torch.allclose(frequencies / llama3_scaled(frequencies, scaling), divisors, rtol=1e-3):
        raise InputError(f"{path} has rotary frequency factors other than Llama 3.1's; give another file")
    return scaling


def _values(tensor: GGUFTensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tensor.read()))
