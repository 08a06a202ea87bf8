"""Reader of GGUF files, one or split into several. Quantised tensors are dequantised as they are read."""

import re
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from export.checkpoints.checkpoint import (
    ChatSource,
    Checkpoint,
    Index,
    StoredBlocks,
    TensorSource,
    match,
    read_head,
    renamed,
    token_ids,
)
from export.checkpoints.gguf_config import ROPE_TENSORS, architecture_of, config_of
from export.checkpoints.gguf_file import MAGIC, GGUFFile, GGUFTensor, read_gguf
from export.checkpoints.gguf_tokenizer import STARTS_TEXTS, TOKENIZER, tokenizer_bytes
from model.block_linear import BLOCK_FORMS
from model.errors import InputError, listed

_NO_WEIGHTS = {GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")}


def is_gguf(path: Path) -> bool:
    """Returns whether the file starts with GGUF's magic number."""
    return read_head(path, len(MAGIC)) == MAGIC


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file, or all parts of a split one. Weights are reordered and divided as they are read.

    Raises:
        InputError: the file is damaged, incomplete, or cannot be exported.
    """
    files, file = _whole(path)
    fields = file.fields
    config = config_of(fields, file.tensors, path)
    sources = {
        name: TensorSource(tensor.shape, partial(_read, tensor), tensor.kind not in _NO_WEIGHTS)
        for name, tensor in file.tensors.items()
    }
    storage = architecture_of(fields, path).storage(file.tensors)
    weights = match(path, config, sources, storage, ROPE_TENSORS)
    raw = {name: replace(source, read=partial(_read_blocks, file.tensors[name])) for name, source in sources.items()}
    stored = match(path, config, raw, storage, ROPE_TENSORS)
    types = {name: file.tensors[renamed(name, storage.names)].kind.name for name in stored}
    bos, eos, eot, eom = (
        token_ids(fields.get(key), key, path, config.vocab_size)
        for key in (f"{TOKENIZER}{name}_token_id" for name in ("bos", "eos", "eot", "eom"))
    )
    starts = fields.get(f"{TOKENIZER}model") != "gpt2" or fields.get(f"{TOKENIZER}pre") in STARTS_TEXTS
    adds = bool(fields.get(f"{TOKENIZER}add_bos_token", starts))
    return Checkpoint(
        config,
        weights,
        files,
        "GGUF",
        architecture=fields["general.architecture"],
        bos_id=bos[0] if bos and adds else None,
        adds_bos=adds,
        stop_ids=tuple(dict.fromkeys(eos + eot + eom)),
        tokenizer=partial(_tokenizer, path, fields) if fields.get(f"{TOKENIZER}model", "none") != "none" else None,
        chat=_chat(fields, bos, eos),
        warnings=_warnings(path, fields),
        types=types,
        blocks={
            name: StoredBlocks(kind, partial(stored.__getitem__, name))
            for name, kind in types.items()
            if kind in BLOCK_FORMS
        },
    )


def _whole(path: Path) -> tuple[tuple[Path, ...], GGUFFile]:
    """Returns the files of a checkpoint of which one is given, and their content together. A file that is split into
    parts has its fields in the first.

    Raises:
        InputError: a file is damaged, or a part is missing.
    """
    given = _opened(path)
    count = given.fields.get("split.count", 1)
    if count == 1:
        return (path,), given
    name = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path.name)
    if type(count) is not int or not name or not name[2].startswith(f"-of-{count:05}"):
        raise InputError(
            f"{path} is one of {count} parts, but not named as such; rename all parts to NAME-00001-of-{count:05}.gguf "
            "and so on"
        )
    files = tuple(path.with_name(f"{name[1]}{number:05}{name[2]}") for number in range(1, count + 1))
    if missing := [file.name for file in files if not file.exists()]:
        raise InputError(f"{path.parent} lacks {listed(missing)}, of {count} parts; download all parts")
    parts = [given if file == path else _opened(file) for file in files]
    tensors = dict[str, GGUFTensor]()
    for number, (file, part) in enumerate(zip(files, parts, strict=True)):
        if (part.fields.get("split.no"), part.fields.get("split.count")) != (number, count):
            raise InputError(f"{file} is not part {number + 1} of {count}, as its name says; download it again")
        tensors |= part.tensors
    return files, GGUFFile(parts[0].fields, tensors)


def _opened(path: Path) -> GGUFFile:
    try:
        return read_gguf(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, struct.error, MemoryError, OverflowError) as error:
        raise InputError(f"{path} is truncated or not a GGUF file ({error}); download it again") from error


def _warnings(path: Path, fields: dict[str, Any]) -> tuple[str, ...]:
    if fields.get(f"{TOKENIZER}model") != "gpt2" or f"{TOKENIZER}pre" in fields:
        return ()
    return (f"{path} does not say how its tokenizer splits text; GPT-2's way is assumed, as in llama.cpp",)


def _chat(fields: dict[str, Any], bos: tuple[int, ...], eos: tuple[int, ...]) -> ChatSource:
    tokens, template = fields.get(f"{TOKENIZER}tokens"), fields.get("tokenizer.chat_template")
    texts = (
        tokens[ids[0]] if ids and isinstance(tokens, list) and ids[0] < len(tokens) else None for ids in (bos, eos)
    )
    return ChatSource(template if isinstance(template, str) else None, *texts)


def _tokenizer(path: Path, fields: dict[str, Any]) -> bytes:
    try:
        return tokenizer_bytes(fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def _read(tensor: GGUFTensor, index: Index) -> Tensor:
    return torch.from_numpy(tensor.read(index))


def _read_blocks(tensor: GGUFTensor, index: Index) -> Tensor:
    return torch.from_numpy(tensor.blocks())[index]
