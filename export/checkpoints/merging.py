"""Merging of adapters into a checkpoint's weights, each when it is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from export.checkpoints.adapters import Adapter, Module
from export.checkpoints.checkpoint import Index, TensorSource
from model.errors import InputError, listed

_MATCHING = "give the base model that it was trained on"


@dataclass(frozen=True)
class Names:
    """The names of a checkpoint's weights.

    Attributes:
        prefix: prefix of the names, which the checkpoint's or the adapter's may lack.
        transposed: returns whether the matrix of a name is stored as [in, out].
        tied: names of the embedding and of the head if they share a matrix; otherwise empty.
    """

    prefix: str
    transposed: Callable[[str], bool]
    tied: tuple[str, ...] = ()


def merged(
    path: Path, sources: Mapping[str, TensorSource], adapters: Sequence[Adapter], names: Names
) -> dict[str, TensorSource]:
    """Returns the checkpoint's tensors with adapters merged into them, one after another.

    An embedding and a head that share a matrix are separated if an adapter changes only one of them, because it was
    trained so.

    Args:
        path: path of the checkpoint, for messages.

    Raises:
        InputError: an adapter does not fit the checkpoint.
    """
    found = dict(sources)
    for name, other in (names.tied, names.tied[::-1]) if names.tied else ():
        if other in found:
            found.setdefault(name, found[other])
    for adapter in adapters:
        found |= _changed(path, found, adapter, names)
    return found


def _changed(
    path: Path, sources: Mapping[str, TensorSource], adapter: Adapter, names: Names
) -> dict[str, TensorSource]:
    """Returns the tensors that an adapter changes."""
    changes, unknown = dict[str, Module](), list[str]()
    for module, change in adapter.modules.items():
        spellings = (module, module.removeprefix(names.prefix), names.prefix + module)
        known = next((each for each in spellings if f"{each}.weight" in sources), None)
        if known is None:
            unknown.append(module)
        else:
            changes[f"{known}.weight"] = change
    if unknown:
        raise InputError(f"--lora {adapter.path} changes {listed(unknown)}, which {path} does not have; {_MATCHING}")
    for name, other in (names.tied, names.tied[::-1]) if names.tied else ():
        if name in changes and (adapter.ties or "tokens" in changes[name].tensors):
            changes.setdefault(other, changes[name])
    found = dict[str, TensorSource]()
    for name, change in changes.items():
        transposed = change.is_embedding or names.transposed(name)
        found[name] = _weight(f"--lora {adapter.path}", name, sources[name], change, transposed)
        if change.tensors.keys() & {"bias", "bias_delta"}:
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias not in sources:
                raise InputError(f"--lora {adapter.path} changes {bias}, which {path} does not have; {_MATCHING}")
            found[bias] = _bias(f"--lora {adapter.path}", bias, sources[bias], change)
    return found


def _weight(whose: str, name: str, base: TensorSource, change: Module, transposed: bool) -> TensorSource:
    """Returns a module's weight with a change."""
    given = change.tensors
    if "weight" in given:
        _check_shape(whose, name, given["weight"].shape, base.shape)
        base = given["weight"]
    if "A" in given:
        shape = (given["B"].shape[0], given["A"].shape[1])
        _check_shape(whose, name, shape[::-1] if transposed else shape, base.shape)
        if "magnitude" in given:
            _check_shape(whose, f"the magnitude of {name}", given["magnitude"].shape, shape[:1])
        base = replace(base, read=partial(_low_rank, base, change, transposed))
    if "tokens" in given:
        _check_shape(whose, f"the tokens of {name}", given["tokens"].shape, (len(change.token_ids), *base.shape[1:]))
        if outside := [token for token in change.token_ids if not 0 <= token < base.shape[0]]:
            raise InputError(f"{whose} trains the token {outside[0]}, but {name} has {base.shape[0]} rows; {_MATCHING}")
        base = replace(base, read=partial(_with_tokens, base, change))
    return base


def _bias(whose: str, name: str, base: TensorSource, change: Module) -> TensorSource:
    """Returns a module's bias with a change."""
    for role in ("bias", "bias_delta"):
        if role in change.tensors:
            _check_shape(whose, name, change.tensors[role].shape, base.shape)
    base = change.tensors.get("bias", base)
    return replace(base, read=partial(_shifted, base, change)) if "bias_delta" in change.tensors else base


def _check_shape(whose: str, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise InputError(
            f"{whose} changes {name} with the shape {list(shape)}, but it needs {list(wanted)}; {_MATCHING}"
        )


def _low_rank(base: TensorSource, change: Module, transposed: bool, index: Index) -> Tensor:
    """Returns a part of a matrix to which a low-rank product is added. With a magnitude (DoRA), the weights of each
    output are scaled to that length.
    """
    first, second = (change.tensors[role].read(()).float() for role in ("B", "A"))
    product = change.scaling * (first @ second)
    matrix = base.read(()).float() + (product.T if transposed else product)
    if "magnitude" in change.tensors:
        inputs = 0 if transposed else 1
        lengths = torch.linalg.norm(matrix, dim=inputs, keepdim=True)
        matrix *= change.tensors["magnitude"].read(()).float().unsqueeze(inputs) / lengths
    return matrix[index]


def _with_tokens(base: TensorSource, change: Module, index: Index) -> Tensor:
    """Returns a part of an embedding in which the rows of some tokens are replaced."""
    matrix = base.read(()).float()
    rows = change.tensors["tokens"].read(()).float()
    return matrix.index_copy(0, torch.tensor(change.token_ids), rows)[index]


def _shifted(base: TensorSource, change: Module, index: Index) -> Tensor:
    shift = change.tensors["bias_delta"].read(()).float()
    return (base.read(()).float() + change.scaling * shift)[index]
