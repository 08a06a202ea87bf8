"""torch.save files, read as data: mapped, and with nothing in them executed."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import InputError, listed


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, mapped from the file where its format allows it (zip, since torch 1.6).

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
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path} holds {listed(map(str, others))}, which are no tensors; give a state dict")
    return state


def _load(path: Path) -> Any:
    with path.open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
