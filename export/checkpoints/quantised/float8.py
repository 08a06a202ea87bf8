"""8-bit floats with a scale for each block, as DeepSeek and Qwen publish them."""

from torch import Tensor

from export.checkpoints.checkpoint import TensorSource
from export.checkpoints.quantised.method import Method, Parts, Settings, check_blocks, matrix, spread


def _block(settings: Settings) -> tuple[int, int] | None:
    size = settings.get("weight_block_size")
    return (int(size[0]), int(size[1])) if size else None


def _weight(parts: Parts, settings: Settings, module: str) -> TensorSource:
    shape, block = parts["codes"].shape, _block(settings)
    check_blocks(module, parts["scales"].shape, shape, block)

    def read() -> Tensor:
        return parts["codes"].read(()).float() * spread(parts["scales"].read(()), shape, block)

    return matrix(shape, read)


def _title(settings: Settings) -> str:
    block = _block(settings)
    return f"8-bit floats in blocks of {block[0]} by {block[1]}" if block else "8-bit floats"


FLOAT8 = Method(
    title=_title,
    endings={"scales": ".weight_scale_inv", "codes": ".weight"},
    weight=_weight,
    unused=(".activation_scale", ".input_scale"),
)
