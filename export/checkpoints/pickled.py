"""Reader of torch.save files. They are memory-mapped where possible, and no code in them is executed."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from export.checkpoints.checkpoint import read_head
from model.errors import InputError, listed

T = TypeVar("T")

_ZIP = b"PK\x03\x04"
_WRAPPERS = ("module.", "_orig_mod.", "language_model.")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file by name, as in `load_model`."""
    return load_model(path)[0]


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a file by name, and the model's settings if the file contains them (llama2.c's ckpt.pt).

    Tensors are memory-mapped if the file's format allows it (zip, since torch 1.6).

    Raises:
        InputError: the file is truncated, contains anything but tensors, or would require code to be executed.
    """
    try:
        state = _load(path)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} contains more than tensors, so loading it could run code; give a file with tensors only"
        ) from error
    except Exception as error:  # damage can raise almost any exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is truncated or not a torch file ({reason}); download it again") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} contains a {type(state).__name__}, not tensors by name; give a state dict")
    settings = state.get("model_args")
    inner = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), None)
    state = without_wrappers(state if inner is None else inner)
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path} contains entries that are not tensors: {listed(map(str, others))}; give a state dict")
    return state, settings if isinstance(settings, dict) else {}


def is_torch_file(path: Path) -> bool:
    """Returns whether the file starts like a torch.save file: a zip, or a pickle of protocol 2."""
    return read_head(path, 4) in (_ZIP, b"\x80\x02\x8a\x0a")


def without_wrappers(tensors: Mapping[str, T]) -> dict[str, T]:
    """Returns the tensors with the prefixes of wrappers removed from their names, if all names have the prefix.
    Wrappers are torch.compile, DataParallel, and models with several kinds of input.
    """
    found = dict(tensors)
    while prefix := next((p for p in _WRAPPERS if found and all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=read_head(path, len(_ZIP)) == _ZIP)
