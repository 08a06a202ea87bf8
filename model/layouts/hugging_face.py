"""A Hugging Face folder: config.json, and weights in one or more .safetensors or pytorch_model.bin files."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.errors import InputError, listed
from model.layouts.common import Checkpoint, LazyWeights, Source, is_plain, match, read_json, token_ids
from model.layouts.pickled import load_tensors

HUGGING_FACE_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.wo.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.up_proj.weight",
    "head.norm.weight": "model.norm.weight",
    "head.output.weight": "lm_head.weight",
}
"""Our name -> Hugging Face's, a star standing for the layer's number."""

_ROTARY_BUFFER = "rotary_emb.inv_freq"  # old checkpoints carry it; it follows from the config


def is_folder(path: Path) -> bool:
    """Whether the path is a folder with a config.json."""
    return path.is_dir() and (path / "config.json").is_file()


def open_folder(path: Path) -> Checkpoint:
    """Opens the folder; generation_config.json's ids win over config.json's, as in transformers."""
    settings = read_json(path / "config.json")
    config = _config(settings, path / "config.json")
    files = _weight_files(path)
    sources = _sources(files)
    spare = {name for name in sources if name.endswith(_ROTARY_BUFFER)}
    if config.tied:
        spare.add(HUGGING_FACE_NAMES["head.output.weight"])  # Hugging Face ties over it, whatever it holds
    weights = match(path, config, sources, HUGGING_FACE_NAMES, spare)
    generation = path / "generation_config.json"
    ids = settings | (read_json(generation) if generation.is_file() else {})
    bos, stop = (token_ids(ids.get(key), key, path, config.vocab_size) for key in ("bos_token_id", "eos_token_id"))
    return Checkpoint(
        config,
        LazyWeights({name: source.read for name, source in weights.items()}),
        (path / "config.json", *files),
        "Hugging Face folder",
        bos_id=bos[0] if bos else None,
        stop_ids=stop,
        tokenizer=next((p for p in (path / "tokenizer.json", path / "tokenizer.model") if p.is_file()), None),
    )


def _config(settings: dict[str, Any], path: Path) -> ModelConfig:
    architectures = settings.get("architectures") or []
    if architectures != ["LlamaForCausalLM"]:
        raise InputError(f"{path} names the architecture {architectures}; only LlamaForCausalLM can be exported so far")
    for key, plain in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if settings.get(key, plain) != plain:
            raise InputError(f"{path} sets {key} to {settings[key]!r}; only {plain!r} can be exported so far")
    try:
        heads, dim = settings["num_attention_heads"], settings["hidden_size"]
        theta, scaling = _rope(settings, path)
        return ModelConfig(
            dim=dim,
            n_layers=settings["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or dim // heads,
            hidden_dim=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            context=settings["max_position_embeddings"],
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=settings.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}; download the checkpoint again") from error
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path} holds a dimension that is no number ({error}); download it again") from error


def _rope(settings: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Reads both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling`."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path} describes its rotary scaling as {rope!r}, which is no object; download it again")
    theta = float(rope.get("rope_theta", settings.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{path} asks for rope scaling {kind!r}; only 'default' and 'llama3' can be exported so far")
    return theta, RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )


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
    return {name: Source(tuple(t.shape), partial(_same, t), is_plain(t)) for name, t in load_tensors(file).items()}


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


def _read_safetensors(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def _same(tensor: Tensor) -> Tensor:
    return tensor
