"""export_cache: what backends made of blocks, kept in a folder, so that a second export of a shape need not lower it.

An entry holds a backend's code of one kind of block. It depends on dimensions, methods and scheme, never on weights.
Or it says that files of certain bytes have passed verification, see `export.quality.verification.verify_once`.
The entry's name is a digest of what it depends on, of this project's sources and of the versions of what lowers.
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
    """Returns `llama-pte` in the user's cache folder (XDG Base Directory Specification)."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "llama-pte"


@functools.cache
def versions() -> dict[str, str]:
    """Returns package -> version, of all that has a part in what an export writes."""
    return {name: version(name) for name in ("llama-pte", "torch", "executorch", "torchao")}


@functools.cache
def source_digest() -> str:
    """Digests our own code: a file made by other code is another export, whatever its version number says."""
    digest = hashlib.sha256()
    for package in ("model", "preproc", "export", "runtime/pte"):
        for file in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


class ExportCache:
    """Entries by what they depend on. A damaged entry, or a folder that cannot be written to, is as good as none."""

    def __init__(self, folder: Path | None) -> None:
        """Keeps entries in `folder`, which need not exist; with None it keeps nothing."""
        self._folder = folder

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns what was put under an equal key, or None.

        Args:
            key: JSON of what the entry depends on, beside sources and versions.
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
        """Keeps an entry, which appears whole or not at all.

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
        except OSError:  # a full or read-only disk: the export itself goes on without
            return

    def _path(self, key: Mapping[str, Any]) -> Path:
        assert self._folder
        whole = {**key, "sources": source_digest(), "versions": versions()}
        return self._folder / f"{hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()}.code"
