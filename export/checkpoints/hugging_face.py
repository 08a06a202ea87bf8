"""Reader of Hugging Face folders: config.json, and weights in .safetensors or pytorch_model.bin files."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.checkpoints.checkpoint import (
    ChatSource,
    Checkpoint,
    Index,
    TensorSource,
    is_plain,
    match,
    read_head,
    read_json,
    recommended,
    token_ids,
)
from export.checkpoints.family import Family
from export.checkpoints.hf_config import config_of, family_of
from export.checkpoints.pickled import is_torch_file, load_tensors, without_wrappers
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


def is_safetensors(path: Path) -> bool:
    """Returns whether the file starts like a safetensors file: a length and a JSON object."""
    return read_head(path, 9)[8:] == b"{"


def open_file(path: Path) -> Checkpoint:
    """Opens a file of weights, with the configuration in the same folder.

    Raises:
        InputError: the folder has no config.json, or as in `open_folder`.
    """
    if not is_folder(path.parent):
        raise InputError(f"{path} has weights but no config.json beside it; put the checkpoint's there")
    return open_folder(path.parent, path)


def open_folder(path: Path, alone: Path | None = None) -> Checkpoint:
    """Opens a Hugging Face folder.

    Args:
        alone: file from which to read all weights, unless it is one of several files of a checkpoint.

    Raises:
        InputError: the folder is incomplete, damaged, or cannot be exported.
    """
    settings = read_json(path / "config.json")
    _check_unquantised(path, settings)
    family, config = family_of(settings, path / "config.json"), config_of(settings, path / "config.json")
    files = _weight_files(path, alone)
    sources = {_known(name, family): source for name, source in without_wrappers(_sources(files)).items()}
    storage = family.storage
    if not any(name.startswith(family.prefix) for name in sources):
        bare = {ours: theirs.removeprefix(family.prefix) for ours, theirs in storage.names.items()}
        storage = replace(storage, names=bare)
    images = {name for name in sources if set(family.unread) & set(name.split("."))}
    spare = images | {name for name in sources if name.endswith(_BUFFERS)}
    if config.tied:
        embedding, head = (storage.names[f"{name}.weight"] for name in ("tok_embeddings", "head.output"))
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


def _check_unquantised(path: Path, settings: dict[str, Any]) -> None:
    """Checks that the weights are not quantised.

    Raises:
        InputError: the configuration says that they are. The message names the method.
    """
    theirs, mlx = settings.get("quantization_config"), settings.get("quantization")
    method = theirs.get("quant_method", "by an unnamed method") if isinstance(theirs, dict) else "mlx" if mlx else None
    if method is not None:
        raise InputError(f"{path} is quantised ({method}); give the unquantised checkpoint")


def _is_tied(sources: dict[str, TensorSource], embedding: str, head: str) -> bool:
    """Returns whether embedding and head share one matrix. If only one of them is stored, it serves as both. If both
    are stored and differ, they are separate, as in transformers.
    """
    if embedding not in sources and head in sources:
        sources[embedding] = sources[head]
    if head not in sources or embedding not in sources:
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


def _sources(files: Iterable[Path]) -> dict[str, TensorSource]:
    sources: dict[str, TensorSource] = {}
    found_in: dict[str, Path] = {}
    for file in files:
        for name, source in (_index_pickled(file) if is_torch_file(file) else _index_safetensors(file)).items():
            if name in sources:
                raise InputError(f"{name} is in both {found_in[name].name} and {file.name}; remove one")
            sources[name], found_in[name] = source, file
    return sources


def _index_pickled(file: Path) -> dict[str, TensorSource]:
    return {
        name: TensorSource(tuple(t.shape), partial(_part, t), is_plain(t)) for name, t in load_tensors(file).items()
    }


def _part(tensor: Tensor, index: Index) -> Tensor:
    return tensor[index]


def _index_safetensors(file: Path) -> dict[str, TensorSource]:
    sources = {}
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                view = tensors.get_slice(name)
                plain = view.get_dtype() in ("F64", "F32", "F16", "BF16")
                sources[name] = TensorSource(tuple(view.get_shape()), partial(_read_safetensors, file, name), plain)
    except SafetensorError as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error
    return sources


def _read_safetensors(file: Path, name: str, index: Index) -> Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_slice(name)[index] if index else tensors.get_tensor(name)
