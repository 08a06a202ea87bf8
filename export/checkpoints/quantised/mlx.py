"""MLX: integers packed along the inputs, with a scale and an offset for each group."""

from torch import Tensor

from export.checkpoints.checkpoint import TensorSource
from export.checkpoints.quantised.method import (
    Method,
    Parts,
    Settings,
    UnreadableError,
    expect,
    grouped,
    matrix,
    unpacked,
    word_count,
)


def _check(settings: Settings) -> None:
    if settings.get("mode", "affine") != "affine":
        raise UnreadableError(f"its mode {settings['mode']!r} is unsupported (supported: affine)")


def _weight(parts: Parts, settings: Settings, module: str) -> TensorSource:
    own = settings.get(module)
    settings = {**settings, **own} if isinstance(own, dict) else settings
    _check(settings)
    bits, size = settings["bits"], settings["group_size"]
    rows, groups = parts["scales"].shape
    columns = groups * size
    expect(parts, module, codes=(rows, word_count(columns, bits)), offsets=(rows, groups))

    def read() -> Tensor:
        codes = unpacked(parts["codes"].read(()), bits, columns).float().view(rows, groups, size)
        scales, offsets = (parts[role].read(()).float().unsqueeze(-1) for role in ("scales", "offsets"))
        return (codes * scales + offsets).view(rows, columns)

    return matrix((rows, columns), read)


MLX = Method(
    title=lambda settings: f"MLX, {grouped(settings)}",
    endings={"scales": ".scales", "codes": ".weight", "offsets": ".biases"},
    weight=_weight,
    check=_check,
)
