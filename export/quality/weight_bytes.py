"""Comparison of the bytes of each parameter in a file with those that the scheme gives for the checkpoint.

If activations are quantised to 8 bits, the logits of a correct file differ from the reference's as much as those of a
file with a small error in a late block, or with another epsilon in every norm. Weights and constants of a correct file
are equal bit for bit.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from executorch.exir import schema
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
from torch import Tensor

from export.lowering.assemble import part_of, weight_digest
from export.lowering.lower import to_bytes
from export.weights.scheme import is_shared
from export.weights.source import WeightSource
from model.config import ModelConfig
from model.model import Llama
from model.norm import Norm
from runtime.engine.executorch import Shard
from runtime.engine.program import files
from runtime.pte.metadata import Metadata, export_identity
from runtime.pte.parts import session_methods

EPSILON = "norm_eps"
"""The name that `altered` yields if the epsilon of the norms differs."""


def altered(path: Path | Sequence[Path], source: WeightSource) -> Iterator[str]:
    """Yields the parameters whose bytes differ, and then EPSILON if the norms' epsilon differs.

    Only parameters that a backend stores under this project's names are compared, see `export.lowering.assemble`. If
    blocks were lowered one by one, these are all matrices except the embedding.

    Args:
        path: the .pte, the folder of its shards or slices, or these files.
    """
    for each in files(path) if isinstance(path, Path) else path:
        metadata = Shard(each).metadata
        part, identity = part_of(source, export_identity(metadata.provenance), metadata.methods[0])
        is_whole = metadata.span == range(source.config.n_layers)
        with each.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
            places = weight_places(program)
            yield from _altered(program, places, part, identity, is_whole)
            if places and not _has_epsilon(program, metadata, source.config):
                yield EPSILON


def _has_epsilon(program: mmap.mmap, metadata: Metadata, config: ModelConfig) -> bool:
    """Returns whether the program's constants include the epsilon of each norm of its blocks, once for each
    method that a session runs; there are more where two parts of a block share a norm.
    """
    with torch.device("meta"):
        norms = sum(isinstance(module, Norm) for module in Llama(config, metadata.span).modules())
    return _scalars(program).count(torch.tensor(config.norm_eps).item()) >= norms * len(
        session_methods(metadata.methods)
    )


def _scalars(program: mmap.mmap) -> list[float]:
    """Returns the float32 constants of a single number, outside the backends' code."""
    tables, base = _tables(program)
    offsets = tables.constant_segment.offsets
    start = base + tables.segments[tables.constant_segment.segment_index].offset
    values = (value.val for plan in tables.execution_plan for value in plan.values)
    return [
        struct.unpack_from("<f", program, start + offsets[value.data_buffer_idx])[0]
        for value in values
        if isinstance(value, schema.Tensor) and value.data_buffer_idx and not value.sizes
    ]


def _altered(
    program: mmap.mmap, places: Mapping[str, tuple[int, int]], source: WeightSource, identity: str, is_whole: bool
) -> Iterator[str]:
    with torch.device("meta"):
        names = list(Llama(source.config).state_dict())
    for name in names:
        wanted = [weight_digest(identity, name, number) for number in range(2)]
        if not places.keys() & set(wanted):
            continue
        held = [places.get(digest) for digest in wanted]
        for place, value in zip(held, _values(source, name, is_whole), strict=False):
            if place is not None and program[place[0] : sum(place)] != to_bytes(value.contiguous()):
                yield name
                break


def _values(source: WeightSource, name: str, is_whole: bool) -> list[Tensor]:
    """Returns the parts of a parameter, as stored in a file. A head that shares the embedding's matrix has the parts of
    the embedding.
    """
    found = [value for _, value in source.parts(name)]
    if is_whole and name == "head.output.weight" and is_shared(source.config, source.scheme) and len(found) > 1:
        shared = source.piece("tok_embeddings").state_dict().values()
        found = [ours if ours.nbytes == theirs.nbytes else theirs for ours, theirs in zip(shared, found, strict=True)]
    return found


def weight_places(program: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Returns the offset and size of a program's named data, by the digest that ends each name."""
    tables, base = _tables(program)
    segments = {data.key[-64:]: tables.segments[data.segment_index] for data in tables.named_data or ()}
    return {digest: (base + segment.offset, segment.size) for digest, segment in segments.items()}


def _tables(program: mmap.mmap) -> tuple[schema.Program, int]:
    """Returns a program without its data, and the offset of its first segment (executorch/schema/extended_header.h)."""
    size, base = struct.unpack_from("<QQ", program, 16)
    return _flatbuffer_to_program(program[:size]), base
