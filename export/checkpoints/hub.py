"""Checkpoints by their name on the Hugging Face hub, org/name: downloaded into its cache, and opened from there."""

import argparse
import re
from pathlib import Path

from model.errors import InputError

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SETTINGS = ("config.json", "generation_config.json", "tokenizer*", "chat_template*")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
"""Files of a checkpoint; repositories hold others too, such as the same weights in other layouts."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `download`."""
    add = parser.add_argument
    add("--hub-token", metavar="TOKEN", help="for private and gated models on the hub (default: HF_TOKEN)")
    add("--cache-dir", type=Path, metavar="FOLDER", help="where downloads are kept (default: the hub's own cache)")


def is_hub_name(checkpoint: Path) -> bool:
    """Whether a checkpoint can only be meant as a name on the hub: it looks like one, and no such path exists."""
    return not checkpoint.exists() and _NAME.fullmatch(checkpoint.as_posix()) is not None


def download(name: Path, token: str | None = None, cache: Path | None = None) -> Path:
    """The folder of a checkpoint on the hub, downloaded unless the cache has it. Without a network the cache is enough.

    Args:
        name: org/name.
        token: for private and gated ones; None takes HF_TOKEN, or what `hf auth login` has stored.
        cache: where downloads are kept; None takes the hub's own place, HF_HOME.

    Raises:
        InputError: there is no such checkpoint, or it cannot be had.
    """
    folder = _snapshot(name, token, cache, (*_SETTINGS, *_SAFETENSORS))
    if not any(folder.glob("model*.safetensors")):
        folder = _snapshot(name, token, cache, (*_SETTINGS, *_PICKLED))
    return folder


def _snapshot(name: Path, token: str | None, cache: Path | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download  # half a second that most exports do not need

    try:
        return Path(snapshot_download(str(name), token=token, cache_dir=cache, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} is gated; accept its licence at https://huggingface.co/{name} and give --hub-token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is neither a path here nor a model on the Hugging Face hub; give another, or --hub-token if it is "
            "private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name} is no path here, the Hugging Face hub cannot be reached, and its cache does not hold all of it; "
            "give a path, or try again with a network"
        ) from error
    except Exception as error:  # the errors of its HTTP client as well, which are of no common kind
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} could not be downloaded from the Hugging Face hub ({reason}); try again") from error
