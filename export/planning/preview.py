"""Previews of exports: file size, memory and quality in each scheme, computed without reading weights."""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from export.checkpoints.checkpoint import Checkpoint, expected_shapes
from export.lowering.backends import BACKENDS
from export.lowering.trace import signatures
from export.planning.memory import FLOAT, MemoryUse, activation_bytes, cache_bytes, packed_bytes
from export.planning.plan import ExportOptions, decided
from export.planning.scheme_search import MIXED, stored_bytes
from export.weights.formats.blocks import Blocks
from export.weights.gguf_types import AS_STORED, MIXTURES, QUANTIZE, mixed_types
from export.weights.scheme import Scheme, matrices
from model.block_linear import BLOCK_FORMS
from model.config import ModelConfig
from preproc import rope

_PROGRAM_BYTES = 14_000
_BLOCK_BYTES = 9_000
"""Size of a program without weights, and its part for each block and method. In real files the latter is between 6,000
and 15,000, which is little beside the weights.
"""

MEASURED: Mapping[str, float] = {
    "fp32": 0.0,
    "q8_0": 0.0053,
    "8da8w": 0.0246,
    "q4_k_m": 0.0482,
    "q4_0": 0.2163,
    "8da4w": 0.4772,
}
"""Relative increase of perplexity by scheme, of SmolLM2 with 135 million parameters, as in the table of
docs/quantisation.md. Larger models lose less.
"""

_CLASSES = {0.0: "as float32", 0.01: "nearly lossless", 0.05: "small loss", 0.1: "clear loss in small models"}
"""Classes by their largest increase of perplexity."""

NOT_MEASURED = "not measured"
KEPT = "weights as stored"


@dataclass(frozen=True)
class Preview:
    """An export in one scheme, before it is made.

    Attributes:
        quantize: name for `--quantize`.
        file_bytes: size of the file.
        memory: private memory of a process that runs the file, which is mapped besides.
        quality: what the scheme costs, in words, see `quality`.
        unlike: how many matrices cannot have the scheme's usual format, because their rows are not whole groups, by
            the format that they have instead.
    """

    quantize: str
    file_bytes: int
    memory: MemoryUse
    quality: str
    unlike: Mapping[str, int]


def quality(quantize: str) -> str:
    """Returns what a scheme costs, in words: the class of its figure in MEASURED."""
    if quantize == AS_STORED:
        return KEPT
    if quantize not in MEASURED:
        return NOT_MEASURED
    found = (name for most, name in _CLASSES.items() if MEASURED[quantize] <= most)
    return next(found, "large loss in small models")


def previews(checkpoint: Checkpoint, options: ExportOptions, text_bytes: int) -> Iterator[Preview]:
    """Yields the previews of all schemes that a checkpoint can have.

    Args:
        options: options of the export; their scheme is ignored.
        text_bytes: size of tokenizer and chat template in the file.

    Raises:
        InputError: the options cannot be used for this checkpoint.
    """
    for name in QUANTIZE:
        if name != AS_STORED or decided(checkpoint, options)[0] == AS_STORED:
            yield _preview(checkpoint, replace(options, quantize=name), text_bytes)


def _preview(checkpoint: Checkpoint, options: ExportOptions, text_bytes: int) -> Preview:
    quantize, scheme, graph = decided(checkpoint, options)
    config = checkpoint.config.for_length(graph.max_seq_len)
    if share := MIXED.get(quantize):  # blocks have equal sizes, so it does not matter which of them have 8 bits
        careful = range(math.ceil(share * config.n_layers))
        scheme = replace(scheme, others={f"layers.{layer}": scheme.linear.fallback for layer in careful})
    methods = signatures(config, graph, scheme.kv_dtype)
    program = _PROGRAM_BYTES + _BLOCK_BYTES * config.n_layers * len(methods)
    return Preview(
        quantize=quantize,
        file_bytes=stored_bytes(config, scheme) + _other_bytes(config, graph.max_seq_len) + text_bytes + program,
        memory=MemoryUse(
            weights=packed_bytes(config, scheme) if BACKENDS[options.backend].packs else 0,
            caches=cache_bytes(config, graph.max_seq_len, scheme.kv_dtype),
            activations=max(activation_bytes(config, method, graph.max_seq_len) for method in methods),
        ),
        quality=quality(quantize),
        unlike=_unlike(quantize, config, scheme),
    )


@functools.lru_cache
def _other_bytes(config: ModelConfig, max_seq_len: int) -> int:
    """Returns the size of what has the same form in every scheme: norms, biases, and the rotary tables."""
    tables = {*matrices(config), "tok_embeddings.weight"}
    others = sum(math.prod(shape) for name, shape in expected_shapes(config).items() if name not in tables)
    return (others + sum(table.numel() for table in rope.tables(config, max_seq_len))) * FLOAT


def _unlike(quantize: str, config: ModelConfig, scheme: Scheme) -> dict[str, int]:
    """Returns `Preview.unlike`. The types of a GGUF always fit, and routers are float32 in every scheme."""
    types = mixed_types(config, MIXTURES[quantize]) if quantize in MIXTURES else {}
    found = Counter[str]()
    for name, (_, columns) in matrices(config).items() if quantize != AS_STORED else ():
        usual = scheme.head if name == "head.output.weight" else scheme.linear
        wanted = Blocks.of(types[name]) if types.get(name) in BLOCK_FORMS else usual
        if not wanted.fits(columns) and not name.endswith(".router.weight"):
            found[str(wanted.fitting(columns))] += 1
    return dict(found)
