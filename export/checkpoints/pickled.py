"""torch.save files, read as data: mapped, and with nothing in them executed."""

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
    """Name -> tensor, as in `load_model`."""
    return load_model(path)[0]


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Name -> tensor, mapped from the file where its format allows it (zip, since torch 1.6), and the model's settings
    where training has written them beside (llama2.c's ckpt.pt).

    Raises:
        InputError: the file is truncated, holds anything but tensors, or asks for code to be run.
    """
    try:
        state = _load(path)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} holds more than tensors and is refused, as loading it could run code") from error
    except Exception as error:  # damage surfaces as almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is truncated or no torch file ({reason}); download it again") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__} where named tensors belong; give a state dict")
    settings = state.get("model_args")
    inner = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), None)
    state = without_wrappers(state if inner is None else inner)
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path} holds {listed(map(str, others))}, which are no tensors; give a state dict")
    return state, settings if isinstance(settings, dict) else {}


def is_torch_file(path: Path) -> bool:
    """Whether the file starts as torch.save starts one: a zip, or a pickle of protocol 2."""
    return read_head(path, 4) in (_ZIP, b"\x80\x02\x8a\x0a")


def without_wrappers(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same by their names without what wrappers (torch.compile, DataParallel, a model of several kinds of input)
    put before all of them.
    """
    found = dict(tensors)
    while prefix := next((p for p in _WRAPPERS if found and all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=read_head(path, len(_ZIP)) == _ZIP)
