"""The table of quantisation methods, and the function that dequantises a checkpoint's weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.checkpoints.checkpoint import TensorSource
from export.checkpoints.quantised.awq import AWQ
from export.checkpoints.quantised.bitsandbytes import EIGHT_BITS, FOUR_BITS
from export.checkpoints.quantised.compressed import PACKED, PLAIN
from export.checkpoints.quantised.float8 import FLOAT8
from export.checkpoints.quantised.gptq import GPTQ
from export.checkpoints.quantised.method import Method, UnreadableError
from export.checkpoints.quantised.mlx import MLX
from export.checkpoints.quantised.mxfp4 import MXFP4
from model.errors import InputError, listed

METHODS: dict[str, tuple[Method, ...]] = {
    "gptq": (GPTQ,),
    "awq": (AWQ,),
    "fp8": (FLOAT8,),
    "compressed-tensors": (PACKED, PLAIN),
    "bitsandbytes": (FOUR_BITS, EIGHT_BITS),
    "mxfp4": (MXFP4,),
    "mlx": (MLX,),
}
"""Maps the methods' names in config.json to what their checkpoints may contain."""


def dequantised(
    path: Path, settings: Mapping[str, Any], sources: Mapping[str, TensorSource]
) -> tuple[dict[str, TensorSource], tuple[str, ...]]:
    """Returns a checkpoint's tensors, with its quantised matrices replaced by float32 ones that are computed when they
    are read, and a sentence about each method; the tensors as they are if nothing is quantised.

    Args:
        path: path of the checkpoint, for messages.
        settings: content of config.json.

    Raises:
        InputError: the weights are quantised in a way that cannot be read. The message names the method.
    """
    found = settings.get("quantization") or settings.get("quantization_config")
    if not found:
        return dict(sources), ()
    said = found if isinstance(found, dict) else {}
    name = str(said.get("quant_method") or ("mlx" if settings.get("quantization") else "by an unnamed method"))
    try:
        if name not in METHODS:
            raise UnreadableError(f"only {listed(METHODS, len(METHODS))} can be read")
        return _replaced(METHODS[name], said, sources)
    except (UnreadableError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, UnreadableError) else f"its settings are damaged ({error!r})"
        raise InputError(f"{path} is quantised ({name}), but {reason}; give the unquantised checkpoint") from error


def _replaced(
    methods: tuple[Method, ...], settings: Mapping[str, Any], sources: Mapping[str, TensorSource]
) -> tuple[dict[str, TensorSource], tuple[str, ...]]:
    found, used = dict(sources), list[str]()
    for method in methods:
        method.check(settings)
        key = next(iter(method.endings.values()))
        modules = [name.removesuffix(key) for name in found if name.endswith(key)]
        for module in modules:
            parts = {role: found.pop(module + end) for role, end in method.endings.items() if module + end in found}
            if lacking := method.endings.keys() - parts.keys() - method.optional:
                raise UnreadableError(f"it lacks {listed(module + method.endings[role] for role in lacking)}")
            found[module + method.result] = method.weight(parts, settings, module)
        used += [method.title(settings)] * bool(modules)
        found = {name: source for name, source in found.items() if not name.endswith(method.unused)}
    if not used:
        keys = listed(next(iter(method.endings.values())) for method in methods)
        raise UnreadableError(f"it has no tensors whose names end in {keys}")
    return found, tuple(f"weights are dequantised from {title}" for title in dict.fromkeys(used))
