"""Scheme: the storage format of each matrix of a model."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from export.weights.formats.blocks import Blocks
from export.weights.formats.float32 import FLOAT
from export.weights.formats.format import Format
from export.weights.formats.integer import BYTE, Integer
from export.weights.formats.registry import parse
from model.block_linear import BLOCK_FORMS
from model.config import ModelConfig
from model.errors import InputError
from model.model import Llama
from runtime.pte.metadata import Metadata

GPTQ = "gptq"
IMPORTANCE = "importance"
CALIBRATIONS = (IMPORTANCE, GPTQ)
"""Roundings of a scheme whose matrices are calibrated by `export.quality.gptq`."""

CACHE_MAX_PPL_INCREASE = {"int8": 0.05}
"""Relative increase of perplexity that verification allows by default for quantised KV caches, by dtype."""


@dataclass(frozen=True)
class Scheme:
    """The storage formats of a model's matrices. A matrix whose rows are not whole groups has its format's fallback.

    Attributes:
        linear: format of the blocks' linear layers.
        head, embedding: formats of these two matrices.
        others: formats of matrices, by name, and of all matrices of a block, by a name such as layers.3, that differ
            from the above.
        rounding: rounding method of weights, one of `export.weights.formats.integer.ROUNDINGS`, or GPTQ or
            IMPORTANCE.
        kv_dtype: dtype of the KV caches, see `model.kv_row_format`.
    """

    linear: Format = FLOAT
    head: Format = FLOAT
    embedding: Format = FLOAT
    others: Mapping[str, Format] = field(default_factory=dict)
    rounding: str = "nearest"
    kv_dtype: str = "float32"

    @staticmethod
    def parse(found: Mapping[str, Any]) -> "Scheme":
        """Returns the scheme stored in a file's provenance."""
        formats = {name: parse(found[name]) for name in ("linear", "head", "embedding")}
        others = {name: parse(group["format"]) for group in found.get("others", ()) for name in group["names"]}
        others |= {f"layers.{layer}": formats["linear"].fallback for layer in found.get("careful", ())}  # older files
        return Scheme(**formats, others=others, rounding=found["rounding"], kv_dtype=found["kv_dtype"])

    @staticmethod
    def of(metadata: Metadata) -> "Scheme":
        """Returns the scheme in which a file's matrices are stored."""
        return Scheme.parse(metadata.provenance["options"]["scheme"])

    def to_json(self) -> dict[str, Any]:
        """Returns the scheme as JSON types, for `parse`. Names in `others` are grouped by their format."""
        groups = dict[Format, list[str]]()
        for name, form in self.others.items():
            groups.setdefault(form, []).append(name)
        return {
            **{name: getattr(self, name).to_json() for name in ("linear", "head", "embedding")},
            "others": [{"format": form.to_json(), "names": names} for form, names in groups.items()],
            "rounding": self.rounding,
            "kv_dtype": self.kv_dtype,
        }

    @property
    def formats(self) -> tuple[Format, ...]:
        """All formats of the scheme, without fallbacks."""
        return tuple(dict.fromkeys((self.linear, self.head, self.embedding, *self.others.values())))

    @property
    def words(self) -> dict[str, str]:
        """The scheme in words, by attribute; of `others`, only the formats."""
        others = ", ".join(dict.fromkeys(map(str, self.others.values()))) or "none"
        return {name: str(value) for name, value in vars(self).items()} | {"others": others}

    @property
    def max_ppl_increase(self) -> float | None:
        """Relative increase of perplexity that verification allows by default: the greatest of the formats' and the
        caches'; None if nothing is quantised.
        """
        limits = [form.max_ppl_increase for form in self.formats]
        return max(filter(None, [*limits, CACHE_MAX_PPL_INCREASE.get(self.kv_dtype)]), default=None)

    @property
    def rounds_inputs(self) -> bool:
        """Whether any linear layer rounds its inputs to 8 bits."""
        return any(form.rounds_inputs for form in (self.linear, self.head, *self.others.values()))

    @property
    def is_calibrated(self) -> bool:
        """Whether matrices are rounded by means of their inputs on a text."""
        return self.rounding in CALIBRATIONS

    @property
    def plain_rounding(self) -> str:
        """Rounding method of matrices that are not calibrated."""
        return "hqq" if self.is_calibrated else self.rounding

    def format(self, name: str, columns: int) -> Format:
        """Returns the format of a matrix with rows of `columns`, by its name in the model, such as
        layers.3.attention.wq.weight.
        """
        if name.endswith(".router.weight"):  # small, and a rounded one would choose other experts
            return FLOAT
        block = re.match(r"layers\.\d+", name)
        form = self.others.get(name) or (self.others.get(block[0]) if block else None)
        if form is None:
            form = {"tok_embeddings.weight": self.embedding, "head.output.weight": self.head}.get(name, self.linear)
        return form.fitting(columns)


_FOUR = Integer(4, 32)
SCHEMES = {
    "fp32": Scheme(),
    "8da4w": Scheme(linear=_FOUR, head=_FOUR, embedding=BYTE),
    "mixed": Scheme(linear=_FOUR, head=BYTE, embedding=BYTE),
    "8da8w": Scheme(linear=BYTE, head=BYTE, embedding=BYTE),
} | {
    name.lower(): Scheme(Blocks.of(name), Blocks.of("Q8_0"), Blocks.of("Q8_0"))
    for name in BLOCK_FORMS
    if name != "Q6_K"  # a mixture, see export.weights.gguf_types
}
"""The schemes available to `--quantize` for every model: 8-bit dynamic activations (8da) with weights of 4 or 8 bits
(4w, 8w), and types of blocks with a head and embedding in Q8_0. `mixed` has 4-bit weights except in the blocks with the
greatest loss, see `export.planning.scheme_search`.
"""

GROUP_SIZES = (32, 64, 128)


def finer(scheme: Scheme) -> list[str]:
    """Returns flags that each reduce the loss of quantisation, in order of increasing file size. Their effect is not
    measured.
    """
    formats, found = scheme.formats, list[str]()
    if any(_is_four(form) and form.group_size != GROUP_SIZES[0] for form in formats):
        found.append(f"--group-size {GROUP_SIZES[0]}")
    has_four = any(_is_four(form) for form in formats)
    if scheme.rounding == "nearest" and any(form.bits and form.bits < 8 for form in formats):
        found.append(f"--rounding {GPTQ}")
    found += [f"--{name}-bits 8" for name in ("head", "embedding") if _is_four(getattr(scheme, name))]
    if _is_four(scheme.linear) and not scheme.others:
        found.append("--quantize mixed")
    if has_four:
        found.append("--quantize 8da8w")
    if any(isinstance(form, Blocks) and form.bits < 8 for form in formats):
        found.append("--quantize q8_0")
    if any(form.bits for form in formats):
        found.append("--quantize fp32")
    if scheme.kv_dtype == "int8":
        found.append("--kv-dtype fp16")
    return found


def adjusted(
    scheme: Scheme,
    group_size: int | None,
    embedding_bits: int | None,
    head_bits: int | None,
    rounding: str,
    one_table: bool = False,
) -> Scheme:
    """Returns a scheme with some settings replaced. None keeps the scheme's own setting.

    Args:
        one_table: whether embedding and head are stored once if their formats are equal. A head of 4 bits that nobody
            asked for then has the 8 bits of its embedding, because one table is smaller than two.

    Raises:
        InputError: a setting is invalid, or has no effect.
    """
    four = Integer(4, group_size or GROUP_SIZES[0])
    formats: dict[int, Format] = {4: four, 8: BYTE}
    for flag, bits in (("embedding", embedding_bits), ("head", head_bits)):
        if bits is not None and bits not in formats:
            raise InputError(f"--{flag}-bits {bits} is invalid; give 4 or 8")
    embedding = formats[embedding_bits] if embedding_bits else scheme.embedding
    head = formats[head_bits] if head_bits else four if _is_four(scheme.head) else scheme.head
    if one_table and head_bits is None and _is_four(head) and embedding == BYTE:
        head = BYTE
    linear = four if _is_four(scheme.linear) else scheme.linear
    made = replace(scheme, linear=linear, head=head, embedding=embedding, rounding=rounding)
    if group_size is not None and group_size not in GROUP_SIZES:
        raise InputError(f"--group-size {group_size} is invalid; give {', '.join(map(str, GROUP_SIZES))}")
    if group_size is not None and four not in (made.linear, made.embedding, made.head):
        raise InputError(f"--group-size {group_size} needs 4-bit weights, but nothing has 4 bits; leave it out")
    return made


def _is_four(form: Format) -> bool:
    return isinstance(form, Integer) and form.bits == 4


def matrix_sizes(config: ModelConfig, scheme: Scheme, span: range | None = None) -> dict[str, int]:
    """Returns the size in bytes of each of `matrices` in the scheme's format."""
    return {name: scheme.format(name, shape[1]).nbytes(*shape) for name, shape in matrices(config, span).items()}


def embedding_size(config: ModelConfig, scheme: Scheme) -> int:
    """Returns the size of the embedding in bytes. A step reads only some rows of it."""
    return scheme.format("tok_embeddings.weight", config.dim).nbytes(config.vocab_size, config.dim)


def is_shared(config: ModelConfig, scheme: Scheme) -> bool:
    """Returns whether embedding and head are one matrix in one format, and are therefore stored only once."""
    roles = ("tok_embeddings.weight", "head.output.weight")
    return config.tied and len({scheme.format(role, config.dim) for role in roles}) == 1


def swaps_pairs(config: ModelConfig, span: range, scheme: Scheme) -> bool:
    """Returns whether the head takes its input in swapped pairs, because its weights are stored in the
    embedding's order.

    This requires the embedding to be in the same shard. Such a model returns one row of logits at a time, because the
    swap does not support a variable number of rows.
    """
    is_here = span == range(config.n_layers) and is_shared(config, scheme)
    return is_here and scheme.format("head.output.weight", config.dim).swaps_pairs


def computes_all_experts(config: ModelConfig, scheme: Scheme) -> bool:
    """Returns whether a mixture computes all experts for every token, as no operator runs the chosen ones alone."""
    experts = {name: columns for name, (_, columns) in matrices(config).items() if ".experts." in name}
    return not all(scheme.format(name, columns).by_operator for name, columns in experts.items())


def format_exceptions(config: ModelConfig, scheme: Scheme) -> dict[str, Format]:
    """Returns the matrices whose format differs from the scheme's for linear layers or the head, by name."""
    usual = {"head.output.weight": scheme.head}
    found = {name: scheme.format(name, columns) for name, (_, columns) in matrices(config).items()}
    return {name: form for name, form in found.items() if form != usual.get(name, scheme.linear)}


@functools.lru_cache
def matrices(config: ModelConfig, span: range | None = None) -> MappingProxyType[str, tuple[int, int]]:
    """Returns names and shapes [out, in] of the matrices that a step multiplies by, in the whole model or in the shard
    of the blocks `span`.
    """
    with torch.device("meta"):
        layers = dict(Llama(config, span).named_modules()).items()
    found = {f"{name}.weight": layer.weight.shape for name, layer in layers if isinstance(layer, nn.Linear)}
    return MappingProxyType({name: (shape[0], shape[1]) for name, shape in found.items()})
