"""Files of tensors by name, .safetensors or torch.save's, as sources that are read lazily."""

import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.checkpoints.checkpoint import Index, TensorSource, is_plain, read_head
from export.checkpoints.pickled import is_torch_file, load_tensors
from model.errors import InputError

_SHORT = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def is_safetensors(path: Path) -> bool:
    """Returns whether the file starts like a safetensors file: a length and a JSON object."""
    return read_head(path, 9)[8:] == b"{"


def tensor_sources(files: Iterable[Path]) -> dict[str, TensorSource]:
    """Returns the tensors of all files by name.

    Raises:
        InputError: a file is damaged, or two have a tensor of the same name.
    """
    sources: dict[str, TensorSource] = {}
    found_in: dict[str, Path] = {}
    for file in files:
        for name, source in (_index_pickled(file) if is_torch_file(file) else _index_safetensors(file)).items():
            if name in sources:
                raise InputError(f"{name} is in both {found_in[name].name} and {file.name}; remove one")
            sources[name], found_in[name] = source, file
    return sources


def bytes_by_dtype(file: Path) -> Counter[str]:
    """Returns the bytes of a file's tensors by the name of their dtype in safetensors, such as BF16. Reads no values.

    Raises:
        InputError: a torch file is damaged.
    """
    found = Counter[str]()
    if is_torch_file(file):
        for tensor in load_tensors(file).values():
            name = str(tensor.dtype).removeprefix("torch.")
            found[_SHORT.get(name, name)] += tensor.nbytes
        return found
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    for tensor in header.values():
        start, end = tensor["data_offsets"]
        found[tensor["dtype"]] += end - start
    return found


def _index_pickled(file: Path) -> dict[str, TensorSource]:
    return {
        name: TensorSource(tuple(t.shape), partial(_part, t), is_plain(t)) for name, t in load_tensors(file).items()
    }


def _part(tensor: Tensor, index: Index) -> Tensor:
    return tensor[index]


def _index_safetensors(file: Path) -> dict[str, TensorSource]:
    sources = {}
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                view = tensors.get_slice(name)
                plain = view.get_dtype() in ("F64", "F32", "F16", "BF16")
                sources[name] = TensorSource(tuple(view.get_shape()), partial(_read_safetensors, file, name), plain)
    except SafetensorError as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error
    return sources


def _read_safetensors(file: Path, name: str, index: Index) -> Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_slice(name)[index] if index else tensors.get_tensor(name)
