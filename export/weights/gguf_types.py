"""Schemes given by the GGUF type of each matrix: those of a GGUF file, and those that llama.cpp gives its mixtures."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from export.weights.formats.blocks import Blocks
from export.weights.formats.float32 import FLOAT
from export.weights.formats.format import Format
from export.weights.scheme import SCHEMES, Scheme, matrices
from model.block_linear import BLOCK_FORMS
from model.config import ModelConfig
from model.errors import InputError

AS_STORED = "gguf"
"""Name for `--quantize` that stands for the types that the matrices of a GGUF checkpoint have."""


def _none(layer: int, layers: int) -> bool:
    return False


def _first_four(layer: int, layers: int) -> bool:
    return layer < 4


def _first_eighth(layer: int, layers: int) -> bool:
    return layer < layers // 8


def _ends_and_thirds(layer: int, layers: int) -> bool:
    """Returns whether a block is in the first or last eighth, or is a third one in between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


class Mixture(NamedTuple):
    """A mixture of types, after llama_tensor_get_type in llama.cpp's src/llama-quant.cpp, without importance matrix.

    Attributes:
        usual: type of most matrices, and of an embedding with a table of its own.
        finer: type of some blocks' matrices.
        values: which blocks have a wv of the finer type, given a block's number and the count of blocks.
        down: which blocks have a w2 of the finer type.
    """

    usual: str
    finer: str
    values: Callable[[int, int], bool] = _none
    down: Callable[[int, int], bool] = _none


MIXTURES = {
    "q4_k_s": Mixture("Q4_K", "Q5_K", _first_four, _first_eighth),
    "q4_k_m": Mixture("Q4_K", "Q6_K", _ends_and_thirds, _ends_and_thirds),
    "q5_k_s": Mixture("Q5_K", "Q5_K"),
    "q5_k_m": Mixture("Q5_K", "Q6_K", _ends_and_thirds, _ends_and_thirds),
    "q6_k": Mixture("Q6_K", "Q6_K"),
}
"""The mixtures available to `--quantize`, by llama.cpp's names."""

QUANTIZE = (*SCHEMES, *MIXTURES, AS_STORED)
"""Everything that `--quantize` takes."""


def default_scheme(types: Mapping[str, str], able: Collection[str]) -> str:
    """Returns the default of `--quantize`: AS_STORED if a weight has a type that the backend runs, else fp32.

    Args:
        types: as in `named_scheme`.
        able: formats that the backend runs, by the names in `export.weights.formats.registry.FORMATS`.
    """
    return AS_STORED if Blocks.kind in able and BLOCK_FORMS.keys() & types.values() else "fp32"


def named_scheme(name: str, config: ModelConfig, types: Mapping[str, str]) -> Scheme:
    """Returns the scheme that `--quantize` names.

    Args:
        types: maps the names of a GGUF file's weights to GGUF's names of their types; empty for other checkpoints.

    Raises:
        InputError: the name is AS_STORED, and no matrix has a type that an operator runs.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    if name in MIXTURES:
        return of_types(config, mixed_types(config, MIXTURES[name]))
    if not BLOCK_FORMS.keys() & types.values():
        found = f"has {' and '.join(sorted(set(types.values())))}" if types else "is none"
        raise InputError(
            f"--quantize {AS_STORED} needs a GGUF with weights in {', '.join(BLOCK_FORMS)}, but the checkpoint "
            f"{found}; choose from {', '.join(QUANTIZE[:-1])}"
        )
    return of_types(config, types)


def of_types(config: ModelConfig, types: Mapping[str, str]) -> Scheme:
    """Returns the scheme in which every matrix has a GGUF type, given by name, or float32 where no operator runs the
    type. Rows that are not whole blocks have the type's fallback.
    """

    def form(name: str, columns: int) -> Format:
        kind = types.get(name)
        return (Blocks.of(kind) if kind in BLOCK_FORMS else FLOAT).fitting(columns)

    shapes = {name: shape for name, shape in matrices(config).items() if name.startswith("layers.")}
    forms = {name: form(name, columns) for name, (_, columns) in shapes.items()}
    sizes = Counter[Format]()
    for name, (rows, columns) in shapes.items():
        sizes[forms[name]] += rows * columns
    embedding = form("tok_embeddings.weight", config.dim)
    head = embedding if config.tied else form("head.output.weight", config.dim)
    plain = Scheme(max(sizes, key=lambda each: sizes[each]), head, embedding)
    others = {name: each for name, each in forms.items() if each != plain.format(name, shapes[name][1])}
    return replace(plain, others=others)


def mixed_types(config: ModelConfig, mixture: Mixture) -> dict[str, str]:
    """Returns the type of each matrix in a mixture, before fallbacks."""
    head = "Q6_K"
    found = {"tok_embeddings.weight": head if config.tied else mixture.usual, "head.output.weight": head}
    for name in matrices(config):
        if name.startswith("layers."):
            found[name] = _type_in_block(name, config, mixture)
    return found


def _type_in_block(name: str, config: ModelConfig, mixture: Mixture) -> str:
    layer, role = int(name.split(".")[1]), name.split(".")[-2]
    if role == "router":
        return "F32"
    if config.n_experts == 8 and role in ("wk", "wv"):
        return "Q8_0"
    if config.n_experts == 8 and role == "wo" and mixture.usual == "Q4_K":
        return "Q5_K"
    chosen = {"wv": mixture.values, "w2": mixture.down}.get(role, _none)
    kind = mixture.finer if chosen(layer, config.n_layers) else mixture.usual
    if role == "wv" and kind == "Q4_K" and config.n_layers == 80 and config.n_kv_heads < config.n_heads:
        return "Q5_K"  # Llama 2 and 3 70B, whose wv is small
    return kind


def unkept(quantize: str, config: ModelConfig, types: Mapping[str, str]) -> tuple[str, ...]:
    """Returns a warning about the matrices that a scheme of a GGUF file's types does not keep as they are. Float32
    loses nothing of them.
    """
    names = ("tok_embeddings.weight", *matrices(config)) if quantize == AS_STORED else ()
    found = Counter(types[name] for name in names if types.get(name, "F32") not in (*BLOCK_FORMS, "F32"))
    if not found:
        return ()
    counts = ", ".join(f"{count} in {kind}" for kind, count in found.items())
    how = "give --quantize q4_k_m or another scheme for a smaller file"
    return (f"warning: no operator runs the types of some matrices ({counts}), which become float32; {how}",)
