"""Description of a checkpoint from its headers: what it is, what it would become in each scheme, what is missing."""

import math
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from export.checkpoints.adapters import open_adapters
from export.checkpoints.checkpoint import Checkpoint, expected_shapes
from export.checkpoints.layouts import open_checkpoint
from export.checkpoints.pickled import is_torch_file
from export.checkpoints.tensor_files import bytes_by_dtype, is_safetensors
from export.planning.plan import ExportOptions, decided
from export.planning.preview import previews
from export.planning.warnings import warnings_of
from export.weights.gguf_types import unkept
from model.errors import InputError
from preproc.tokenizer import kind_of
from runtime.pte.metadata import NO_TOKENIZER

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""Suffixes of files with weights."""


def describe_checkpoint(options: ExportOptions) -> dict[str, Any]:
    """Returns everything that `inspect` prints about a checkpoint, as JSON types.

    Raises:
        InputError: the checkpoint cannot be opened, or the options cannot be used for it.
    """
    adapters = open_adapters(options.lora, options.hub_token, options.cache_dir)
    checkpoint = open_checkpoint(options.checkpoint, options.hub_token, options.cache_dir, adapters)
    quantize, _, graph = decided(checkpoint, options)
    tokenizer, problem = _tokenizer(checkpoint)
    template = checkpoint.chat.template or ""
    warnings = (
        *warnings_of(checkpoint, None, graph.max_seq_len, checkpoint.stop_ids),
        *unkept(quantize, checkpoint.config, checkpoint.types),
    )
    return {
        "checkpoint": str(options.checkpoint),
        "layout": checkpoint.layout,
        "architecture": checkpoint.architecture,
        "config": asdict(checkpoint.config),
        "parameters": _parameters(checkpoint),
        "stored_bytes": dict(_stored(checkpoint).most_common()),
        "tokenizer": tokenizer,
        "chat_template": bool(template),
        "notes": list(checkpoint.notes),
        "problems": [*problem, *(warning.removeprefix("warning: ") for warning in warnings)],
        "ignored_files": _ignored(checkpoint, options.checkpoint),
        "max_seq_len": graph.max_seq_len,
        "default": quantize,
        "schemes": [
            asdict(found) | {"memory": asdict(found.memory) | {"total": found.memory.total}}
            for found in previews(checkpoint, options, tokenizer["bytes"] + len(template.encode()))
        ],
        "command": shlex.join(_command(options, has_tokenizer=not problem)),
    }


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Returns the number of parameters, and of those that a token uses, which are fewer in a mixture of experts."""
    config, total, active = checkpoint.config, 0, 0.0
    for name, shape in expected_shapes(config).items():
        count = math.prod(shape)
        total += count
        active += count * config.n_chosen_experts / config.n_experts if ".experts." in name else count
    return {"total": total, "active": round(active)}


def _stored(checkpoint: Checkpoint) -> Counter[str]:
    """Returns the bytes of the checkpoint's tensors by type or dtype."""
    found, shapes = Counter[str](), expected_shapes(checkpoint.config)
    for name, kind in checkpoint.types.items():
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        found[kind] += math.prod(shapes[name]) // per_block * block_bytes
    for file in checkpoint.files:
        if is_safetensors(file) or is_torch_file(file):
            found += bytes_by_dtype(file)
    return found or Counter({"F32": 4 * sum(map(math.prod, shapes.values()))})  # llama2.c


def _tokenizer(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """Returns the kind and size of the checkpoint's tokenizer, and what is wrong with it. It is not loaded."""
    source = checkpoint.tokenizer
    try:
        if source is None:
            raise InputError("the checkpoint has no tokenizer; give export --tokenizer FILE, or none for no tokenizer")
        data = source.read_bytes() if isinstance(source, Path) else source()
        return {"kind": kind_of(data), "bytes": len(data)}, []
    except InputError as error:
        return {"kind": NO_TOKENIZER, "bytes": 0}, [str(error)]


def _ignored(checkpoint: Checkpoint, path: Path) -> list[str]:
    """Returns the names of files with weights in a checkpoint's folder that are not read."""
    if not path.is_dir():
        return []
    read = {file.name for file in checkpoint.files}
    return sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHTS and file.name not in read)


def _command(options: ExportOptions, has_tokenizer: bool) -> Iterator[str]:
    """Yields the arguments of the command that exports the checkpoint in the default scheme."""
    yield from ("llama-pte", "export", "--checkpoint", str(options.checkpoint))
    for adapter in options.lora:
        yield from ("--lora", adapter)
    if not has_tokenizer:
        yield from ("--tokenizer", "FILE")
    if options.max_seq_len:
        yield from ("--max-seq-len", str(options.max_seq_len))
