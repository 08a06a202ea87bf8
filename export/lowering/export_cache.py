"""A folder of lowered blocks and verification results, so that a second export of the same shape reuses them.

An entry holds a backend's code for one kind of block, which depends on dimensions, methods and scheme, but not on
weights. Other entries record that files with certain bytes have passed verification, see
`export.quality.verification.verify_once`. The name of an entry is a digest of everything it depends on, including this
project's sources and the versions of the packages used.
"""

import functools
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

_CHECKSUM_BYTES = 16


def default_folder() -> Path:
    """Returns the folder `llama-pte` in the user's cache folder (XDG Base Directory Specification)."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "llama-pte"


@functools.cache
def versions() -> dict[str, str]:
    """Returns the version of each package that affects the content of an exported file."""
    return {name: version(name) for name in ("llama-pte", "torch", "executorch", "torchao")}


@functools.cache
def source_digest() -> str:
    """Returns a digest of the project's own code, so that a change of the code invalidates the cache even if the
    version is the same.
    """
    digest = hashlib.sha256()
    for package in ("model", "preproc", "export", "runtime/pte"):
        for file in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


class ExportCache:
    """Cache entries by their keys. A damaged entry or an unusable folder is treated as a missing entry."""

    def __init__(self, folder: Path | None) -> None:
        """Uses `folder`, which is created when needed; None disables the cache."""
        self._folder = folder

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the entry stored under an equal key, or None.

        Args:
            key: JSON object with everything the entry depends on, besides sources and versions.
        """
        try:
            data = self._path(key).read_bytes() if self._folder else b""
        except OSError:
            return None
        body = data[_CHECKSUM_BYTES:]
        if not body or xxhash.xxh3_128_digest(body) != data[:_CHECKSUM_BYTES]:
            return None
        return torch.load(io.BytesIO(body), weights_only=True)

    def put(self, key: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
        """Stores an entry, completely or not at all.

        Args:
            entry: plain values and tensors.
        """
        if self._folder is None:
            return
        stream = io.BytesIO()
        torch.save(dict(entry), stream)
        body = stream.getvalue()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", suffix=".partial", delete=False) as file:
                try:
                    file.write(xxhash.xxh3_128_digest(body) + body)
                    file.close()
                    os.replace(file.name, self._path(key))
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError:  # full or read-only disk: continue without the cache
            return

    def _path(self, key: Mapping[str, Any]) -> Path:
        assert self._folder
        whole = {**key, "sources": source_digest(), "versions": versions()}
        return self._folder / f"{hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()}.code"
