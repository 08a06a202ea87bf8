"""compressed-tensors, which llm-compressor writes: integers packed along the inputs, or plain 8-bit numbers."""

from collections.abc import Iterator

from torch import Tensor

from export.checkpoints.checkpoint import TensorSource
from export.checkpoints.quantised.method import (
    Method,
    Parts,
    Settings,
    UnreadableError,
    block_counts,
    check_blocks,
    expect,
    grouped,
    matrix,
    spread,
    unpacked,
    word_count,
)

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_UNUSED = (
    *(f".{kind}_{what}" for kind in ("input", "output") for what in ("scale", "zero_point", "global_scale")),
    *(f".{kind}_{what}" for kind in ("q", "k", "v") for what in ("scale", "zero_point")),
)


def _arguments(settings: Settings) -> Iterator[Settings]:
    """Yields the weights' settings of every group of modules."""
    for group in settings["config_groups"].values():
        if group.get("weights"):
            yield group["weights"]


def _check(settings: Settings) -> None:
    formats = [settings["format"], *(group.get("format") for group in settings["config_groups"].values())]
    if unknown := [name for name in formats if name and name not in _FORMATS]:
        raise UnreadableError(f"its format {unknown[0]!r} is unsupported (supported: {', '.join(_FORMATS)})")
    if settings.get("quantization_status", "compressed") != "compressed":
        raise UnreadableError(f"its status is {settings['quantization_status']!r} and not 'compressed'")
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense" or settings.get("transform_config"):
        raise UnreadableError("sparsity and transforms of activations are unsupported")


def _packed(parts: Parts, settings: Settings, module: str) -> TensorSource:
    """Returns a matrix whose integers are packed along the inputs, and whose zero points may be packed along the
    outputs.
    """
    expect(parts, module, sizes=(2,))
    rows, columns = (int(size) for size in parts["sizes"].read(()))
    words, groups = parts["codes"].shape[-1], parts["scales"].shape[-1]
    known = sorted({each["num_bits"] for each in _arguments(settings)})
    bits = next((each for each in known if 1 <= each <= 8 and word_count(columns, each) == words), None)
    if bits is None:
        raise UnreadableError(f"{module} has {words} words for {columns} inputs, which do not fit num_bits {known}")
    expect(parts, module, codes=(rows, words))
    found = dict(parts)
    found["codes"] = matrix((rows, columns), lambda: _signed(parts["codes"].read(()), bits, columns))
    if "zeros" in parts and parts["zeros"].shape == (word_count(rows, bits), groups):
        found["zeros"] = matrix((rows, groups), lambda: _signed(parts["zeros"].read(()).T, bits, rows).T)
    return _scaled(found, settings, module)


def _signed(words: Tensor, bits: int, count: int) -> Tensor:
    """Returns packed numbers to which half of their range was added, as float32 [N, count]."""
    return unpacked(words, bits, count).float() - (1 << bits - 1)


def _plain(parts: Parts, settings: Settings, module: str) -> TensorSource:
    """Returns a matrix whose numbers are stored one by one, as int8 or float8."""
    if parts["codes"].plain:
        raise UnreadableError(f"{module} has scales, but its weights are not quantised")
    return _scaled(parts, settings, module)


def _scaled(parts: Parts, settings: Settings, module: str) -> TensorSource:
    """Returns (codes - zeros) * scales, with scales and zero points of the matrix, or of each row, group or block."""
    shape, scales = parts["codes"].shape, parts["scales"].shape
    blocks = [tuple(each["block_structure"]) for each in _arguments(settings) if each.get("block_structure")]
    block = next((block for block in blocks if scales == block_counts(shape, block)), None)
    check_blocks(module, scales, shape, block)
    expect(parts, module, zeros=scales, groups=shape[1:])

    def spread_out(role: str) -> Tensor:
        numbers, order = parts[role].read(()), _order(parts)
        return spread(numbers, shape, block) if order is None else numbers.float()[:, order]

    def read() -> Tensor:
        codes = parts["codes"].read(()).float()
        return (codes - spread_out("zeros") if "zeros" in parts else codes) * spread_out("scales")

    return matrix(shape, read)


def _order(parts: Parts) -> Tensor | None:
    """Returns the group of each input, or None for groups of consecutive inputs, which a stored -1 stands for, too."""
    order = parts["groups"].read(()).long() if "groups" in parts else None
    return None if order is None or (order < 0).any() else order


def _title(settings: Settings) -> str:
    kinds = {
        f"{grouped({'bits': each['num_bits'], 'group_size': each.get('group_size')})} ({each.get('type', 'int')})"
        for each in _arguments(settings)
    }
    return f"compressed-tensors, {' and '.join(sorted(kinds))}"


PACKED = Method(
    title=_title,
    endings={
        "codes": ".weight_packed",
        "scales": ".weight_scale",
        "sizes": ".weight_shape",
        "zeros": ".weight_zero_point",
        "groups": ".weight_g_idx",
    },
    weight=_packed,
    optional=frozenset({"zeros", "groups"}),
    check=_check,
    unused=_UNUSED,
)

PLAIN = Method(
    title=_title,
    endings={"scales": ".weight_scale", "codes": ".weight", "zeros": ".weight_zero_point", "groups": ".weight_g_idx"},
    weight=_plain,
    optional=frozenset({"zeros", "groups"}),
    check=_check,
    unused=_UNUSED,
)
