"""Conversion of config.json to ModelConfig, by the table of families."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from export.checkpoints.families import FAMILIES
from export.checkpoints.family import ACTIVATIONS, Family, Settings, value_of
from model.config import ModelConfig, RopeScaling
from model.errors import InputError, listed

_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation")
_LAYER_TYPES = {"sliding_attention": True, "full_attention": False}

_NULLS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads")
"""Keys for which null has a meaning. For any other key, null is treated as if the key were missing, as in
transformers.
"""

_WHOLE = {field.name for field in fields(ModelConfig) if field.type in (int, int | None)}


def family_of(settings: Settings, path: Path) -> Family:
    """Returns the family named in config.json.

    Raises:
        InputError: config.json names no known architecture, or several.
    """
    architectures = settings.get("architectures") or []
    if not isinstance(architectures, list) or len(architectures) != 1 or str(architectures[0]) not in FAMILIES:
        raise InputError(
            f"{path} has the unsupported architecture {architectures}; supported are {listed(FAMILIES, len(FAMILIES))}"
        )
    return FAMILIES[architectures[0]]


def config_of(settings: Settings, path: Path) -> ModelConfig:
    """Returns the ModelConfig described by config.json.

    Raises:
        InputError: a key is missing, damaged, or has a value that cannot be exported.
        ValueError: the dimensions are inconsistent.
    """
    family = family_of(settings, path)
    settings = _completed(settings, family, path)
    try:
        found = dict(family.features) | {field: value_of(settings, key) for field, key in family.keys.items()}
        found = {field: _whole(value) if field in _WHOLE else value for field, value in found.items()}
        found["n_kv_heads"] = found.get("n_kv_heads") or found["n_heads"]
        found["head_dim"] = found.get("head_dim") or found["dim"] // found["n_heads"]
        found["hidden_dim"] = found.get("hidden_dim") or 4 * found["dim"]
        if found.get("positions", "rope") == "rope":
            found |= _rope(settings, family, found["head_dim"], path)
        config = ModelConfig(**found)
        layers = range(config.n_layers)
        local = _local_layers(settings, family, config.n_layers, path)
        return replace(
            config,
            nope_layers=tuple(layer for layer in layers if not family.rotates(settings, layer, layer in local)),
            local_layers=local,
            sliding_window=_whole(settings["sliding_window"]) if local else None,
            local_rope_theta=_local_theta(settings, config, path) if local else None,
        )
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}; add it, or give another checkpoint") from error
    except (TypeError, ZeroDivisionError, IndexError) as error:
        raise InputError(f"{path} has a dimension that is not a number ({error}); correct it") from error


def _completed(settings: Settings, family: Family, path: Path) -> dict[str, Any]:
    """Returns all keys, including those of sections and the defaults of missing ones.

    Raises:
        InputError: a key has a value that would change the result in a way that is not implemented.
    """
    found = dict(settings)
    for section in family.sections:
        content = settings.get(section) or {}
        if not isinstance(content, dict):
            raise InputError(f"{path} sets {section} to a {type(content).__name__}, which is invalid; give an object")
        found |= content
    found = {family.other_keys.get(key, key): value for key, value in found.items()}
    found = {key: value for key, value in found.items() if value is not None or key in _NULLS}
    for key, known in {**family.only, **dict.fromkeys(_ACTIVATION_KEYS, tuple(ACTIVATIONS))}.items():
        if found.get(key, known[0]) not in known:
            only = " or ".join(repr(value) for value in known)
            raise InputError(f"{path} sets {key} to {found[key]!r}, which is unsupported; only {only} can be exported")
    return {**family.defaults, **found}


def _whole(value: Any) -> Any:
    """Returns an int if the value is a whole number written as a float, such as JSON's 32768.0; otherwise the value
    itself.
    """
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _local_layers(settings: Settings, family: Family, n_layers: int, path: Path) -> tuple[int, ...]:
    """Returns the blocks that attend only to the sliding window."""
    types = settings["layer_types"] if "layer_types" in family.defaults else None
    if types is None:
        windowed = settings.get("sliding_window") is not None
        return tuple(layer for layer in range(n_layers) if windowed and family.local(settings, layer))
    if not isinstance(types, list) or len(types) != n_layers or not set(map(str, types)) <= _LAYER_TYPES.keys():
        raise InputError(
            f"{path} sets layer_types to {types}, which is invalid; give one of {listed(_LAYER_TYPES)} for each layer"
        )
    return tuple(layer for layer, kind in enumerate(types) if _LAYER_TYPES[kind])


def _rope(settings: Settings, family: Family, head_dim: int, path: Path) -> dict[str, Any]:
    """Returns the rotary fields of ModelConfig. Both formats are read: `rope_parameters` (transformers 5), and
    `rope_theta` with `rope_scaling`.
    """
    rope: Any = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if "rope_local_base_freq" in settings and isinstance(rope, dict):
        rope = rope.get("full_attention", rope)
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(
            f"{path} sets its rope scaling to {rope!r}, which is invalid; give an object without nested objects"
        )
    theta: Any = settings["rope_theta"] if rope.get("rope_theta") is None else rope["rope_theta"]
    found = {"rope_theta": float(theta), "rope_scaling": _scaling(rope, settings, family, path)}
    share: Any = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if share in (None, 1):
        return found
    if "partial_rotary_factor" not in family.defaults:
        raise InputError(f"{path} sets partial_rotary_factor to {share!r}; its architecture supports only 1")
    return found | {"rotary_dim": int(head_dim * share)}


def _local_theta(settings: Settings, config: ModelConfig, path: Path) -> float | None:
    """Returns the base of the rotary frequencies of local blocks; None if they have the same frequencies as others."""
    if "rope_local_base_freq" not in settings or config.positions != "rope":
        return None
    rope = (settings.get("rope_parameters") or {}).get("sliding_attention") or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise InputError(f"{path} has the unsupported rope scaling {kind!r} of local blocks; supported is default")
    theta = float(rope.get("rope_theta") or settings["rope_local_base_freq"])
    return None if theta == config.rope_theta and config.rope_scaling is None else theta


def _scaling(rope: Settings, settings: Settings, family: Family, path: Path) -> RopeScaling | None:
    named = rope.get("rope_type", rope.get("type", "default"))
    kind = family.rope_kinds.get(named, named)
    if kind == "default":
        return None
    if kind not in RopeScaling.KINDS:
        raise InputError(
            f"{path} has the unsupported rope scaling {named!r}; supported are default, {', '.join(RopeScaling.KINDS)}"
        )
    context = _whole(settings["max_position_embeddings"])
    original, factor = context, rope.get("factor")
    if kind in ("llama3", "yarn", "longrope"):
        key = "original_max_position_embeddings"
        original = _whole(settings.get(key) or rope.get(key) or context)
    if kind in ("yarn", "longrope") and factor is None:
        factor = max(1.0, context / original)
    if factor is None:
        raise KeyError("factor")
    found: dict[str, Any] = {"kind": kind, "factor": float(factor), "original_context": original}
    if kind == "llama3":
        found |= {key: float(rope[key]) for key in ("low_freq_factor", "high_freq_factor")}
    elif kind == "longrope":
        found |= {"short_factors": tuple(rope["short_factor"]), "long_factors": tuple(rope["long_factor"])}
    elif kind == "yarn":
        found |= {"beta_fast": float(rope.get("beta_fast") or 32), "beta_slow": float(rope.get("beta_slow") or 1)}
        found["truncate"] = bool(rope.get("truncate", True))
    if kind in ("yarn", "longrope"):
        found["attention_factor"] = rope.get("attention_factor")
    if kind == "yarn" and found["attention_factor"] is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        growth = 0.1 * math.log(factor)
        found["attention_factor"] = (growth * rope["mscale"] + 1) / (growth * rope["mscale_all_dim"] + 1)
    return RopeScaling(**found)
