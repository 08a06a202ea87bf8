"""PEFT adapters of LoRA's kinds, which are merged into a checkpoint's weights as they are read."""

import argparse
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoints import hub
from export.checkpoints.checkpoint import TensorSource, read_head, read_json
from export.checkpoints.tensor_files import tensor_sources
from model.errors import InputError, listed

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_UNSUPPORTED = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "megatron_config",
)
"""Settings of adapters that cannot be merged into single matrices, or change the base model otherwise."""

_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model's weights as they are."""

_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias_delta",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".token_adapter.base_layer.weight": "weight",
    ".base_layer.weight": "weight",
    ".base_layer.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}
"""Maps endings of tensor names in an adapter's file to their roles, in the order in which they are tried."""


@dataclass(frozen=True)
class Module:
    """The changes that an adapter makes to one module of the model.

    Attributes:
        tensors: the adapter's tensors by their roles, which are the values of `_ROLES`.
        is_embedding: whether the low-rank matrices are those of an embedding, [r, V] and [D, r].
        scaling: factor of the low-rank product.
        token_ids: ids of the rows that `tokens` replaces.
    """

    tensors: Mapping[str, TensorSource]
    is_embedding: bool = False
    scaling: float = 1.0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """An adapter that has been opened and checked. Its tensors are still on storage.

    Attributes:
        path: its folder.
        name: its name for messages and metadata.
        scale: factor of all its low-rank products.
        modules: changes by the module's name in the model.
        ties: whether a change of the embedding also changes a head that shares its matrix.
        sha256: digest of its files.
    """

    path: Path
    name: str
    scale: float
    modules: Mapping[str, Module]
    ties: bool
    sha256: str

    @property
    def record(self) -> dict[str, Any]:
        """The adapter's part of a file's metadata."""
        return {"name": self.name, "scale": self.scale, "sha256": self.sha256}


def add_lora_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for `open_adapters`."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FOLDER[:SCALE]",
        help="PEFT adapter to merge into the weights (LoRA, rsLoRA or DoRA), a folder or org/name on the hub, with a "
        "factor if it is not to count fully; may be repeated",
    )


def open_adapters(
    given: Sequence[str], hub_token: str | None = None, cache_dir: Path | None = None
) -> tuple[Adapter, ...]:
    """Opens the adapters given by `--lora`: each FOLDER or FOLDER:scale, where the folder may be org/name on the hub.

    Raises:
        InputError: an adapter is missing, damaged, or of an unsupported kind.
    """
    return tuple(_open(*_parsed(each), hub_token, cache_dir) for each in given)


def check_beside(path: Path, adapters: Sequence[Adapter]) -> None:
    """Checks that a checkpoint's folder has no adapter that is not merged. transformers would apply it.

    Raises:
        InputError: there is such an adapter.
    """
    if (path / CONFIG).is_file() and not any(adapter.path.samefile(path) for adapter in adapters):
        raise InputError(
            f"{path} has a LoRA adapter beside the base model; give --lora {path} to merge it, or move {CONFIG} away"
        )


def _parsed(given: str) -> tuple[Path, float]:
    folder, colon, scale = given.rpartition(":")
    if not colon or Path(given).exists():
        return Path(given), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--lora {given} has the scale {scale!r}, which is not a number; give FOLDER or FOLDER:0.5")
    return Path(folder), value


def _open(path: Path, scale: float, hub_token: str | None, cache_dir: Path | None) -> Adapter:
    name = path.as_posix() if hub.is_hub_name(path) else path.resolve().name
    if hub.is_hub_name(path):
        path = hub.download_adapter(path, hub_token, cache_dir)
    if read_head(path, 4) == b"GGUF" or path.suffix == ".gguf":
        raise InputError(f"--lora {path} is a GGUF adapter, which is unsupported; give a PEFT adapter's folder")
    weights = next((path / file for file in _WEIGHTS if (path / file).is_file()), None)
    if not (path / CONFIG).is_file() or weights is None:
        raise InputError(f"--lora {path} is no PEFT adapter: it lacks {CONFIG} or {' and '.join(_WEIGHTS)}")
    settings = read_json(path / CONFIG)
    _check_kind(path, settings)
    digest = hashlib.sha256((path / CONFIG).read_bytes() + weights.read_bytes()).hexdigest()
    try:
        modules = _modules(path, tensor_sources([weights]), settings, scale)
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path / CONFIG} is damaged ({error!r}); download it again") from error
    return Adapter(path, name, scale, modules, bool(settings.get("ensure_weight_tying")), digest)


def _check_kind(path: Path, settings: Mapping[str, Any]) -> None:
    kind, start = settings.get("peft_type"), settings.get("init_lora_weights", True)
    if kind != "LORA":
        raise InputError(f"--lora {path} is an adapter of the unsupported type {kind}; only LORA can be merged")
    if used := [key for key in _UNSUPPORTED if settings.get(key)]:
        raise InputError(
            f"--lora {path} sets {listed(used)}, which cannot be merged here; merge it with PEFT (merge_and_unload)"
        )
    if start not in _INITIALISATIONS:
        raise InputError(
            f"--lora {path} sets init_lora_weights to {start!r}, which changes the base model; convert it to plain "
            "LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )


def _modules(
    path: Path, tensors: Mapping[str, TensorSource], settings: Mapping[str, Any], scale: float
) -> dict[str, Module]:
    """Returns the changes by module.

    Raises:
        InputError: a tensor is unknown, or matrices do not fit together.
    """
    found: dict[str, dict[str, TensorSource]] = {}
    embeddings = set()
    for name, source in tensors.items():
        bare = name.removeprefix("base_model.model.")
        ending = next((ending for ending in _ROLES if bare.endswith(ending)), None)
        module = bare.removesuffix(ending or "")
        if ending is None or "lora_" in module or not source.plain:
            raise InputError(f"{path} has {name}, which is not a tensor of a LoRA adapter; merge it with PEFT")
        found.setdefault(module, {})[_ROLES[ending]] = source
        embeddings |= {module} if ending.startswith(".lora_embedding") else set()
    ids = _token_ids(settings)
    return {
        module: Module(
            roles,
            module in embeddings,
            scale * _scaling(path, module, roles, settings),
            ids.get(_pattern(ids, module), ()) if "tokens" in roles else (),
        )
        for module, roles in found.items()
    }


def _token_ids(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    ids = settings.get("trainable_token_indices") or {}
    return {name: tuple(rows) for name, rows in (ids if isinstance(ids, dict) else {"embed_tokens": ids}).items()}


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """Returns the first of PEFT's patterns that matches the end of a module's name, or the name if none does."""
    return next((each for each in patterns if re.match(rf"(.*\.)?({each})$", module)), module)


def _scaling(path: Path, module: str, roles: Mapping[str, TensorSource], settings: Mapping[str, Any]) -> float:
    """Returns the factor of a module's low-rank product, after checking that its matrices fit together."""
    if not roles.keys() & {"A", "B", "magnitude", "bias_delta"}:
        return 1.0
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    rank = ranks.get(_pattern(ranks, module), settings["r"])
    alpha = alphas.get(_pattern(alphas, module), settings["lora_alpha"])
    shapes = [roles[role].shape if role in roles else () for role in ("A", "B")]
    if [len(shape) for shape in shapes] != [2, 2] or not rank == shapes[0][0] == shapes[1][1]:
        raise InputError(
            f"{path} has matrices of the shapes {' and '.join(str(list(shape)) for shape in shapes)} for {module}, "
            f"which are not of rank {rank}; give a complete adapter"
        )
    return float(alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)
