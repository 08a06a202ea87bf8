"""Joins the metadata of one model's files: shards, which run one after another, or slices, which run in parallel."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from model.errors import InputError
from runtime.pte.metadata import STREAM, Metadata, MethodSpec, Requirements, TensorSpec


def join_parts(files: Mapping[Path, Metadata], partial: bool = False) -> Metadata:
    """Returns the metadata of the whole model from its shards or slices, in any order, or from its only file.

    The caches of joined slices have the heads of one slice after those of another; that is more heads than in the model
    if slices share heads.

    Args:
        partial: whether the files may be only some neighbouring shards, whose methods then take and return the stream,
            or only some slices, whose caches then have only these slices' heads.

    Raises:
        InputError: a file is from another export, occurs twice, or is missing; the message names it.
    """
    parts = sorted(files.values(), key=lambda part: (part.span.start, part.slice))
    first, *others = parts
    if any(part.slices > 1 for part in parts):
        _check_slices(files, partial)
        return _united(parts, (_across(parts),), sum(part.activation_bytes for part in parts))
    ends = (first.span.start, parts[-1].span.stop) if partial else (0, first.config.n_layers)
    check_shards({str(path): (part.identity, part.span) for path, part in files.items()}, range(*ends))
    methods = tuple(compose_methods(specs) for specs in zip(*(part.methods for part in parts), strict=True))
    return _united(parts, methods, max(part.activation_bytes for part in parts)) if others else first


def _united(parts: Sequence[Metadata], methods: tuple[MethodSpec, ...], activation_bytes: int) -> Metadata:
    """Returns the first part's metadata with these methods and activation bytes, and all parts' requirements."""
    requirements = [part.requirements for part in parts]
    return dataclasses.replace(
        parts[0],
        matrix_bytes=sum(part.matrix_bytes for part in parts),
        activation_bytes=activation_bytes,
        methods=methods,
        requirements=Requirements(
            executorch=requirements[0].executorch,
            backends=tuple(sorted({name for each in requirements for name in each.backends})),
            operators=tuple(sorted({name for each in requirements for name in each.operators})),
        ),
    )


def check_shards(shards: Mapping[str, tuple[bytes, range]], wanted: range) -> None:
    """Checks that shards are exactly the blocks `wanted` of one model.

    Args:
        shards: path of each shard -> its identity and its blocks.

    Raises:
        InputError: as in `join_parts`.
    """
    ordered = sorted(shards.items(), key=lambda each: each[1][1].start)
    place, identity = check_same_export([(place, identity) for place, (identity, _) in ordered])
    end = wanted.start
    for other, (_, span) in [*ordered, ("", (identity, range(wanted.stop, wanted.stop)))]:
        if span.start < end:
            raise InputError(f"{other} has block {span.start}, which another shard also has; remove one")
        if end < span.start:
            raise InputError(
                f"the shard with blocks {end} to {span.start - 1} is missing beside {place}; copy it there or export "
                "again"
            )
        end = span.stop


def check_same_export(identities: Sequence[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Checks that all files are from one export, and returns the path and identity of the first.

    Args:
        identities: path and identity of each file.

    Raises:
        InputError: as in `join_parts`.
    """
    (place, identity), *others = identities
    for other, found in others:
        if found != identity:
            raise InputError(
                f"{other} is from another export than {place}; keep the shards or slices of one export together"
            )
    return place, identity


def _check_slices(slices: Mapping[Path, Metadata], partial: bool) -> None:
    """Checks that every slice occurs exactly once; if `partial`, that none occurs twice."""
    ordered = sorted(slices.items(), key=lambda each: each[1].slice)
    place, _ = check_same_export([(str(path), part.identity) for path, part in ordered])
    count, seen = ordered[0][1].slices, set[int]()
    for path, part in ordered:
        if part.slice in seen:
            raise InputError(f"{path} is slice {part.slice + 1} of {count}, as is another file; remove one")
        seen.add(part.slice)
    if not partial and (missing := sorted(set(range(count)) - seen)):
        raise InputError(f"slice {missing[0] + 1} of {count} is missing beside {place}; copy it there or export again")


def _across(slices: Sequence[Metadata]) -> MethodSpec:
    """Returns the spec of the method that runs the halves of all slices, with joined cache heads and whole logits."""
    count, vocab_size, one = len(slices), slices[0].config.vocab_size, compose_methods(slices[0].methods)

    def whole(tensor: TensorSpec) -> TensorSpec:
        if tensor.layer is not None:
            return dataclasses.replace(tensor, shape=(count * tensor.sizes(1)[0], *tensor.shape[1:]))
        return (
            dataclasses.replace(tensor, shape=(*tensor.shape[:-1], vocab_size)) if tensor.name == "logits" else tensor
        )

    inputs, outputs = (tuple(map(whole, found)) for found in (one.inputs, one.outputs))
    return dataclasses.replace(one, inputs=inputs, outputs=outputs, slice=0, slices=1)


def session_methods(methods: Sequence[MethodSpec]) -> tuple[MethodSpec, ...]:
    """Returns the methods that a session calls: each method, or one that joins the halves of a slice."""
    return (compose_methods(methods),) if methods[0].slices > 1 else tuple(methods)


def compose_methods(specs: Sequence[MethodSpec]) -> MethodSpec:
    """Returns the spec of the method that runs several one after another, without the stream passed between them."""

    def union(found: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
        """Returns the specs without duplicates, in a whole file's order: keys and then values after all others."""
        specs = {spec.name: spec for spec in found}.values()
        return tuple(sorted(specs, key=lambda spec: "" if spec.layer is None else spec.role))

    first, last = specs[0], specs[-1]
    return dataclasses.replace(
        first,
        name=first.whole,
        max_rows=last.max_rows,
        end_layer=last.end_layer,
        inputs=union(each for spec in specs for each in spec.inputs if each.name != STREAM or spec is first),
        outputs=union(each for spec in specs for each in spec.outputs if each.name != STREAM or spec is last),
    )
