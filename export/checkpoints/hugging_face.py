"""Reader of Hugging Face folders: config.json, and weights in .safetensors or pytorch_model.bin files."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from export.checkpoints.adapters import Adapter, check_beside
from export.checkpoints.checkpoint import (
    ChatSource,
    Checkpoint,
    Storage,
    TensorSource,
    match,
    read_json,
    recommended,
    starred,
    token_ids,
)
from export.checkpoints.family import Family
from export.checkpoints.hf_config import config_of, family_of
from export.checkpoints.merging import Names, merged
from export.checkpoints.pickled import without_wrappers
from export.checkpoints.quantised.methods import dequantised
from export.checkpoints.tensor_files import tensor_sources
from model.errors import InputError, listed
from preproc.tokenizer import from_bytes, token_text

_BUFFERS = (
    ".rotary_emb.inv_freq",
    *(".attn.bias", ".attn.masked_bias", ".attn.causal_mask"),
    *(".attention.bias", ".attention.masked_bias"),
    *(".act_fn.beta", ".act_fn.eps"),
)
"""Suffixes of the names of tensors in old checkpoints that are derived from the configuration and are not weights."""


def is_folder(path: Path) -> bool:
    """Returns whether the path is a folder with a config.json."""
    return path.is_dir() and (path / "config.json").is_file()


def open_file(path: Path, adapters: Sequence[Adapter] = ()) -> Checkpoint:
    """Opens a file of weights, with the configuration in the same folder, as `open_folder` does.

    Raises:
        InputError: the folder has no config.json, or as in `open_folder`.
    """
    if not is_folder(path.parent):
        raise InputError(f"{path} has weights but no config.json beside it; put the checkpoint's there")
    return open_folder(path.parent, adapters, path)


def open_folder(path: Path, adapters: Sequence[Adapter] = (), alone: Path | None = None) -> Checkpoint:
    """Opens a Hugging Face folder.

    Args:
        adapters: adapters to merge into the weights.
        alone: file from which to read all weights, unless it is one of several files of a checkpoint.

    Raises:
        InputError: the folder is incomplete, damaged, or cannot be exported.
    """
    check_beside(path, adapters)
    settings = read_json(path / "config.json")
    family, config = family_of(settings, path / "config.json"), config_of(settings, path / "config.json")
    files = _weight_files(path, alone)
    found, notes = dequantised(path, settings, without_wrappers(tensor_sources(files)))
    sources = {_known(name, family): source for name, source in found.items()}
    storage = family.storage
    if notes and storage.transposed:
        raise InputError(f"{path} is quantised, which its architecture must not be; give the unquantised checkpoint")
    if not any(name.startswith(family.prefix) for name in sources):
        bare = {ours: theirs.removeprefix(family.prefix) for ours, theirs in storage.names.items()}
        storage = replace(storage, names=bare)
    images = {name for name in sources if set(family.unread) & set(name.split("."))}
    spare = images | {name for name in sources if name.endswith(_BUFFERS)}
    embedding, head = (storage.names[f"{name}.weight"] for name in ("tok_embeddings", "head.output"))
    if adapters:
        names = Names(family.prefix, partial(_is_transposed, storage), (embedding, head) if config.tied else ())
        sources = merged(path, sources, adapters, names)
    if config.tied:
        config = replace(config, tied=_is_tied(sources, embedding, head))
        spare.add(head)
    weights = match(path, config, sources, storage, spare)
    generation, said = (_object(path / name) for name in ("generation_config.json", "tokenizer_config.json"))
    chat = _chat(path, said)
    bos, *stop = (
        token_ids(each.get(key), key, path, config.vocab_size)
        for each, key in (
            (generation if generation.get("bos_token_id") is not None else settings, "bos_token_id"),
            (generation, "eos_token_id"),
            (settings, "eos_token_id"),
        )
    )
    stop.append(_named(chat.eos_token, path, said, config.vocab_size))
    tokenizer = _tokenizer(path, said)
    decides = isinstance(tokenizer, Path) and tokenizer.suffix == ".json"  # it then decides if a text starts with BOS
    return Checkpoint(
        config,
        weights,
        (path / "config.json", *files),
        "Hugging Face folder",
        architecture=settings["architectures"][0],
        notes=(*notes, *(f"adapter {adapter.name} is merged, scale {adapter.scale:g}" for adapter in adapters)),
        bos_id=bos[0] if bos and not decides else None,
        adds_bos=None if decides else said.get("add_bos_token"),
        stop_ids=tuple(dict.fromkeys(itertools.chain(*stop))),
        tokenizer=tokenizer,
        chat=chat,
        sampling=recommended(generation, path / "generation_config.json"),
        warnings=(f"{path} also takes images, which are left out: only its language model is exported",) * bool(images),
    )


def _known(name: str, family: Family) -> str:
    """Returns the name of a weight with the parts that the family's table has."""
    parts = (family.other_parts.get(part, part) for part in name.split("."))
    return ".".join(part for part in parts if part)


def _is_transposed(storage: Storage, name: str) -> bool:
    """Returns whether the layout stores a matrix as [in, out], which holds for the blocks' alone."""
    blocks = (theirs for ours, theirs in storage.names.items() if ours.startswith("layers."))
    return storage.transposed and starred(name) in blocks


def _is_tied(sources: dict[str, TensorSource], embedding: str, head: str) -> bool:
    """Returns whether embedding and head share one matrix. If only one of them is stored, it serves as both. If both
    are stored and differ, they are separate, as in transformers.
    """
    if embedding not in sources and head in sources:
        sources[embedding] = sources[head]
    if head not in sources or embedding not in sources:
        return True
    if sources[head] is sources[embedding]:
        return True
    if sources[head].shape != sources[embedding].shape:
        return False
    return torch.equal(sources[head].read(()), sources[embedding].read(()))


def _object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty one if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _named(token: str | None, path: Path, said: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Returns the id of a token as a tuple, empty if unknown. It is looked up in tokenizer.json, or without one in the
    added tokens of added_tokens.json and tokenizer_config.json.
    """
    if token is None:
        return ()
    whole = _object(path / "tokenizer.json")
    model, added = whole.get("model") or {}, whole.get("added_tokens") or ()
    ids = [entry.get("id") for entry in added if isinstance(entry, dict) and entry.get("content") == token]
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not ids and isinstance(vocabulary, dict) and token in vocabulary:
        ids = [vocabulary[token]]
    if not whole:
        ids = [number for number, text in _added_tokens(path, said).items() if text == token]
    return token_ids(ids, f"eos_token {token!r}", path, vocab_size)


def _added_tokens(path: Path, said: dict[str, Any]) -> dict[int, str]:
    """Returns the id and text of the tokens that added_tokens.json and tokenizer_config.json add to the vocabulary."""
    found = {number: text for text, number in _object(path / "added_tokens.json").items() if type(number) is int}
    listed_there = said.get("added_tokens_decoder")
    for number, token in listed_there.items() if isinstance(listed_there, dict) else ():
        text = token_text(token)
        if text is not None and str(number).isdecimal():
            found[int(number)] = text
    return found


def _tokenizer(path: Path, said: dict[str, Any]) -> Path | Callable[[], bytes] | None:
    """Returns the tokenizer's file, or a function that returns its bytes. If transformers would produce other ids than
    the file, that function raises InputError.
    """
    whole, pieces = path / "tokenizer.json", path / "tokenizer.model"
    if whole.is_file():
        return whole
    if pieces.is_file():
        added = _added_tokens(path, said)
        return partial(_pieces, pieces, added) if added else pieces
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return partial(_refuse, f"{path} has its tokenizer only as vocab.json and merges.txt")
    return None


def _pieces(file: Path, added: dict[int, str]) -> bytes:
    """Returns the bytes of a tokenizer.model.

    Raises:
        InputError: the checkpoint adds tokens that the file does not contain.
    """
    data = file.read_bytes()
    size = from_bytes(data).vocab_size
    if missing := [text for number, text in sorted(added.items()) if number >= size]:
        _refuse(f"{file} lacks {listed(missing)}, which added_tokens.json or tokenizer_config.json add")
    return data


def _refuse(what: str) -> NoReturn:
    raise InputError(
        f"{what}; save a tokenizer.json there: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _chat(path: Path, said: dict[str, Any]) -> ChatSource:
    """Returns the chat settings in tokenizer_config.json. As in transformers, chat_template.jinja takes precedence over
    its template.
    """
    alone = path / "chat_template.jinja"
    template = said.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if alone.is_file():
        template = alone.read_text(encoding="utf-8-sig")
    tokens = _object(path / "special_tokens_map.json") | said
    bos, eos = (token_text(tokens.get(key)) for key in ("bos_token", "eos_token"))
    return ChatSource(template if isinstance(template, str) else None, bos, eos)


def _weight_files(path: Path, alone: Path | None) -> list[Path]:
    """Returns the safetensors files, or the pickled files if there are none: a single file, or those listed in an
    index. If `alone` is given and not listed in an index, it is the only one.

    Raises:
        InputError: there are no weights, or a listed file is missing.
    """
    named = [name for index in path.glob("*.index.json") for name in _indexed_names(index)]
    if alone is not None and alone.name not in named:
        return [alone]
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if index.is_file():
            names = _indexed_names(index)
            if absent := [name for name in names if not (path / name).is_file()]:
                raise InputError(f"{path} lacks {listed(absent)}, which its index names; download the checkpoint again")
            return [path / name for name in names]
        if (path / single).is_file():
            return [path / single]
    raise InputError(f"{path} has neither model.safetensors, pytorch_model.bin nor an index; download it again")


def _indexed_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map with file names; download the checkpoint again")
    return sorted(set(weight_map.values()))
