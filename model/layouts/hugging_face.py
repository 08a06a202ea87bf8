"""A Hugging Face folder: config.json, and weights in one or more .safetensors or pytorch_model.bin files."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import InputError, listed
from model.layouts.common import ChatSource, Checkpoint, Index, Source, is_plain, match, read_json, token_ids
from model.layouts.pickled import load_tensors
from model.layouts.settings import config_of, family_of

_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attn.causal_mask")
"""How the names of tensors end that old checkpoints carry, and that follow from the configuration."""
_WRAPPERS = ("module.", "_orig_mod.")


def is_folder(path: Path) -> bool:
    """Whether the path is a folder with a config.json."""
    return path.is_dir() and (path / "config.json").is_file()


def open_folder(path: Path) -> Checkpoint:
    """Opens the folder; generation_config.json's ids win over config.json's, as in transformers."""
    settings = read_json(path / "config.json")
    _check_unquantised(path, settings)
    family, config = family_of(settings, path / "config.json"), config_of(settings, path / "config.json")
    files = _weight_files(path)
    sources = _bare(_sources(files))
    storage = family.storage
    if not any(name.startswith(family.prefix) for name in sources):
        bare = {ours: theirs.removeprefix(family.prefix) for ours, theirs in storage.names.items()}
        storage = replace(storage, names=bare)
    spare = {name for name in sources if name.endswith(_BUFFERS)}
    if config.tied:
        embedding, head = (storage.names[f"{name}.weight"] for name in ("tok_embeddings", "head.output"))
        config = replace(config, tied=_is_tied(sources, embedding, head))
        spare.add(head)
    weights = match(path, config, sources, storage, spare)
    generation = path / "generation_config.json"
    ids = settings | (read_json(generation) if generation.is_file() else {})
    bos, stop = (token_ids(ids.get(key), key, path, config.vocab_size) for key in ("bos_token_id", "eos_token_id"))
    tokenizer = next((p for p in (path / "tokenizer.json", path / "tokenizer.model") if p.is_file()), None)
    decides = tokenizer is not None and tokenizer.suffix == ".json"  # whether a text starts with BOS
    chat = _chat(path)
    return Checkpoint(
        config,
        weights,
        (path / "config.json", *files),
        "Hugging Face folder",
        bos_id=bos[0] if bos and not decides else None,
        stop_ids=stop or _named(chat.eos_token, tokenizer, config.vocab_size),
        tokenizer=tokenizer,
        chat=chat,
    )


def _check_unquantised(path: Path, settings: dict[str, Any]) -> None:
    """Raises:
    InputError: the configuration says that the weights are quantised; names the method.
    """
    theirs, mlx = settings.get("quantization_config"), settings.get("quantization")
    method = theirs.get("quant_method", "by an unnamed method") if isinstance(theirs, dict) else "mlx" if mlx else None
    if method is not None:
        raise InputError(f"{path} is quantised ({method}); give the unquantised checkpoint")


def _is_tied(sources: dict[str, Source], embedding: str, head: str) -> bool:
    """Whether one matrix is embedding and head. The one that is there stands for both; where both are there and differ,
    each is its own, as in transformers.
    """
    if embedding not in sources and head in sources:
        sources[embedding] = sources[head]
    if head not in sources or embedding not in sources or sources[head].shape != sources[embedding].shape:
        return True
    return torch.equal(sources[head].read(()), sources[embedding].read(()))


def _bare(sources: dict[str, Source]) -> dict[str, Source]:
    """The sources by their names without what wrappers (torch.compile, DataParallel) put before all of them."""
    for prefix in _WRAPPERS:
        if sources and all(name.startswith(prefix) for name in sources):
            sources = {name.removeprefix(prefix): source for name, source in sources.items()}
    return sources


def _named(token: str | None, tokenizer: Path | None, vocab_size: int) -> tuple[int, ...]:
    """The id of an added token of a tokenizer.json; none where there is no such file or token."""
    if token is None or tokenizer is None or tokenizer.suffix != ".json":
        return ()
    added = read_json(tokenizer).get("added_tokens")
    ids = [entry.get("id") for entry in added or () if isinstance(entry, dict) and entry.get("content") == token]
    return token_ids(ids, f"added_tokens {token!r}", tokenizer, vocab_size)


def _chat(path: Path) -> ChatSource:
    """From tokenizer_config.json, over whose template a chat_template.jinja wins, as in transformers."""
    file, alone = path / "tokenizer_config.json", path / "chat_template.jinja"
    settings = read_json(file) if file.is_file() else {}
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if alone.is_file():
        template = alone.read_text(encoding="utf-8")
    bos, eos = (_token_text(settings.get(key)) for key in ("bos_token", "eos_token"))
    return ChatSource(template if isinstance(template, str) else None, bos, eos)


def _token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with its text as content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files, or the pickled ones where there are none: a single file, or those that an index names."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if index.is_file():
            names = _indexed_names(index)
            if absent := [name for name in names if not (path / name).is_file()]:
                raise InputError(f"{path} lacks {listed(absent)}, which its index names; download the checkpoint again")
            return [path / name for name in names]
        if (path / single).is_file():
            return [path / single]
    raise InputError(f"{path} holds neither model.safetensors, pytorch_model.bin nor an index; download it again")


def _indexed_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} holds no weight_map of file names; download the checkpoint again")
    return sorted(set(weight_map.values()))


def _sources(files: Iterable[Path]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    found_in: dict[str, Path] = {}
    for file in files:
        for name, source in (_index_pickled(file) if file.suffix == ".bin" else _index_safetensors(file)).items():
            if name in sources:
                raise InputError(f"{name} stands in both {found_in[name].name} and {file.name}; remove one")
            sources[name], found_in[name] = source, file
    return sources


def _index_pickled(file: Path) -> dict[str, Source]:
    return {name: Source(tuple(t.shape), partial(_part, t), is_plain(t)) for name, t in load_tensors(file).items()}


def _part(tensor: Tensor, index: Index) -> Tensor:
    return tensor[index]


def _index_safetensors(file: Path) -> dict[str, Source]:
    sources = {}
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                view = tensors.get_slice(name)
                plain = view.get_dtype() in ("F64", "F32", "F16", "BF16")
                sources[name] = Source(tuple(view.get_shape()), partial(_read_safetensors, file, name), plain)
    except SafetensorError as error:
        raise InputError(f"{file} is truncated or no safetensors file ({error}); download it again") from error
    return sources


def _read_safetensors(file: Path, name: str, index: Index) -> Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_slice(name)[index] if index else tensors.get_tensor(name)
