"""Reader of Meta's folders: params.json, and one consolidated.NN.pth file per tensor-parallel rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.checkpoints import hugging_face
from export.checkpoints.checkpoint import (
    Checkpoint,
    Storage,
    TensorSource,
    expected_shapes,
    is_plain,
    match,
    read_json,
    renamed,
)
from export.checkpoints.pickled import load_model, load_tensors
from model.config import ModelConfig, RopeScaling
from model.errors import InputError, listed

META_NAMES = {
    "tok_embeddings.weight": "tok_embeddings.weight",
    "layers.*.attention_norm.weight": "layers.*.attention_norm.weight",
    "layers.*.attention.wq.weight": "layers.*.attention.wq.weight",
    "layers.*.attention.wk.weight": "layers.*.attention.wk.weight",
    "layers.*.attention.wv.weight": "layers.*.attention.wv.weight",
    "layers.*.attention.wo.weight": "layers.*.attention.wo.weight",
    "layers.*.ffn_norm.weight": "layers.*.ffn_norm.weight",
    "layers.*.feed_forward.w1.weight": "layers.*.feed_forward.w1.weight",
    "layers.*.feed_forward.w2.weight": "layers.*.feed_forward.w2.weight",
    "layers.*.feed_forward.w3.weight": "layers.*.feed_forward.w3.weight",
    "head.norm.weight": "norm.weight",
    "head.output.weight": "output.weight",
}
"""Maps our weight names to Meta's, with a star for the layer's number."""

_SPARE = {"rope.freqs", "freqs_cos", "freqs_sin"}  # buffers of Llama 1 and 2 and llama2.c, derived from the settings


def is_folder(path: Path) -> bool:
    """Returns whether the path is a folder with params.json and a first consolidated file."""
    return (path / "params.json").is_file() and (path / "consolidated.00.pth").is_file()


def open_folder(path: Path) -> Checkpoint:
    """Opens a Meta folder. Rotary pairs are interleaved in the files; wq and wk are reordered as they are read.

    Raises:
        InputError: files are missing, damaged, or inconsistent.
    """
    files = _shard_files(path)
    shards = [load_tensors(file) for file in files]
    if uneven := {name for shard in shards for name in shard.keys() ^ shards[0].keys()}:
        raise InputError(f"{path}: {listed(uneven)} are not in every consolidated file; download the checkpoint again")
    return _open(path, read_json(path / "params.json"), shards, (path / "params.json", *files))


def _open(path: Path, settings: dict[str, Any], shards: list[dict[str, Tensor]], files: tuple[Path, ...]) -> Checkpoint:
    """Returns the checkpoint of settings and weights that have been loaded."""
    config = _config(settings, shards, path)
    shapes = {renamed(name, META_NAMES): shape for name, shape in expected_shapes(config).items()}
    sources = {
        name: _joined(name, [shard[name] for shard in shards], shapes.get(name)) for name in shards[0].keys() - _SPARE
    }
    tokenizer = (path if path.is_dir() else path.parent) / "tokenizer.model"
    return Checkpoint(
        config,
        match(path, config, sources, Storage(META_NAMES, interleaved=True), {"output.weight"} if config.tied else ()),
        files,
        "Meta folder" if path.is_dir() else "torch file",
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )


def open_file(path: Path) -> Checkpoint:
    """Opens a single torch file.

    The file is Meta's or llama2.c's ckpt.pt, with settings in the file or in a params.json beside it; or it holds
    weights of a Hugging Face checkpoint with a config.json beside it.

    Raises:
        InputError: there are no settings, or they belong to another model.
    """
    beside = path.parent / "params.json"
    if path.name.startswith("consolidated.") and is_folder(path.parent):
        return open_folder(path.parent)
    state, trained = load_model(path)
    if "tok_embeddings.weight" not in state:
        return hugging_face.open_file(path)
    if not trained and not beside.is_file():
        raise InputError(f"{path} has weights but no params.json beside it; put the checkpoint's there")
    said = read_json(beside) if beside.is_file() else {}
    settings = {"norm_eps": 1e-5} | said | trained  # llama2.c does not store this value
    found = _open(path, settings, [state], (path, beside) if said else (path,))
    return replace(found, bos_id=1, stop_ids=(1, 2)) if trained else found  # BOS and stop ids of llama2.c's texts


def _shard_files(path: Path) -> list[Path]:
    files = sorted(path.glob("consolidated.*.pth"))
    wanted = [path / f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if absent := [file.name for file in wanted if file not in files]:
        raise InputError(f"{path} lacks {listed(absent)}; download the checkpoint again")
    return files


def _config(settings: dict[str, Any], shards: list[dict[str, Tensor]], path: Path) -> ModelConfig:
    """Returns the dimensions in params.json. Those that Llama 2's params.json omits (vocabulary, feed-forward) are
    taken from the tensors.
    """
    try:
        dim, heads = settings["dim"], settings["n_heads"]
        theta = float(settings.get("rope_theta", 10000.0))
        return ModelConfig(
            dim=dim,
            n_layers=settings["n_layers"],
            n_heads=heads,
            n_kv_heads=settings.get("n_kv_heads") or heads,
            head_dim=dim // heads,
            hidden_dim=sum(shard["layers.0.feed_forward.w1.weight"].shape[0] for shard in shards),
            vocab_size=sum(shard["output.weight"].shape[0] for shard in shards),
            context=settings.get("max_seq_len") or _context(settings, theta),
            norm_eps=settings["norm_eps"],
            tied=all(torch.equal(shard["output.weight"], shard["tok_embeddings.weight"]) for shard in shards),
            rope_theta=theta,
            rope_scaling=_scaling(settings, dim) if settings.get("use_scaled_rope") else None,
        )
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}; add it to params.json, or give another checkpoint") from error
    except (TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        raise InputError(f"{path} has a dimension that is not a number ({error}); correct its params.json") from error


def _context(settings: dict[str, Any], theta: float) -> int:
    """Returns the number of positions for which the model was trained, which params.json does not contain. It is
    derived from the rotary settings: Llama 3.1 and later have scaling; the base is 500,000 in Llama 3, 1,000,000 in
    Code Llama, and 10,000 in Llama 2.
    """
    if settings.get("use_scaled_rope"):
        return 131072
    return {500000.0: 8192, 1000000.0: 16384}.get(theta, 4096)


def _scaling(settings: dict[str, Any], dim: int) -> RopeScaling:
    """Returns the rope scaling. The default factor is 8, as in Llama 3.1, or 32 for models narrower than any Llama 3.1,
    as in the small models of Llama 3.2.
    """
    factor = settings.get("rope_scaling_factor") or (32.0 if dim < 4096 else 8.0)
    return RopeScaling("llama3", factor, original_context=8192)


def _joined(name: str, parts: list[Tensor], shape: tuple[int, ...] | None) -> TensorSource:
    """Joins the parts of a tensor from all ranks, along the dimension in which the parts are smaller than `shape`.

    Column-parallel matrices are split by rows, row-parallel ones by columns. The embedding is split by columns in Llama
    2 and by rows in Llama 3. Norms are complete on every rank.
    """
    first, plain = tuple(parts[0].shape), all(map(is_plain, parts))
    same_shape = all(part.shape == parts[0].shape for part in parts)
    if len(parts) == 1 or shape is None or not same_shape or len(first) != len(shape) or first == shape:
        return TensorSource(first, lambda index: parts[0][index], plain)
    split = next(dim for dim, (have, want) in enumerate(zip(first, shape, strict=True)) if have != want)
    joined = (*first[:split], first[split] * len(parts), *first[split + 1 :])
    return TensorSource(joined, lambda index: torch.cat(parts, dim=split)[index], plain)
