"""Download of checkpoints by their Hugging Face hub name, org/name, into the hub's cache."""

import argparse
import re
from pathlib import Path

from model.errors import InputError

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SETTINGS = ("config.json", "generation_config.json", "tokenizer*", "chat_template*")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
"""Patterns of the files of a checkpoint. Repositories may hold other files, such as the same weights in other
layouts.
"""

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for `download`."""
    add = parser.add_argument
    add(
        "--hub-token",
        metavar="TOKEN",
        help="access token for private and gated models on the Hugging Face hub (default: $HF_TOKEN)",
    )
    add("--cache-dir", type=Path, metavar="FOLDER", help="folder for downloads (default: the Hugging Face hub's cache)")


def is_hub_name(checkpoint: Path) -> bool:
    """Returns whether a checkpoint's path is a name on the hub: it has the form org/name, and no such path exists."""
    return not checkpoint.exists() and _NAME.fullmatch(checkpoint.as_posix()) is not None


def download(name: Path, token: str | None = None, cache: Path | None = None) -> Path:
    """Returns the folder of a checkpoint on the hub, which is downloaded unless it is in the cache. A cached checkpoint
    does not require a network.

    Args:
        name: org/name.
        token: access token for private and gated models; None for HF_TOKEN, or the token stored by `hf auth login`.
        cache: folder for downloads; None for the hub's default, set by HF_HOME.

    Raises:
        InputError: there is no such checkpoint, or it cannot be downloaded.
    """
    folder = _snapshot(name, token, cache, (*_SETTINGS, *_SAFETENSORS))
    if not any(folder.glob("model*.safetensors")):
        folder = _snapshot(name, token, cache, (*_SETTINGS, *_PICKLED))
    return folder


def download_adapter(name: Path, token: str | None = None, cache: Path | None = None) -> Path:
    """Returns the folder of a PEFT adapter on the hub, as `download` does for a checkpoint."""
    return _snapshot(name, token, cache, _ADAPTER)


def _snapshot(name: Path, token: str | None, cache: Path | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download  # takes half a second to import; most exports do not use it

    try:
        return Path(snapshot_download(str(name), token=token, cache_dir=cache, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} is gated; accept its licence at https://huggingface.co/{name} and give --hub-token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is neither an existing path nor a model on the Hugging Face hub; correct it, or give --hub-token "
            "if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name} is not an existing path, the Hugging Face hub cannot be reached, and its cache is incomplete; "
            "give a path, or try again with a network connection"
        ) from error
    except Exception as error:  # errors of the HTTP client have no common base class
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} could not be downloaded from the Hugging Face hub ({reason}); try again") from error
