"""Writes checkpoints in the layouts that export.checkpoints.layouts reads."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor

from export.checkpoints.checkpoint import renamed
from export.checkpoints.meta import META_NAMES
from export.checkpoints.weight_names import GGUF_NAMES, HUGGING_FACE_NAMES
from export.weights.formats.block_rounding import blocks_of
from model.model import Llama
from preproc import rope


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Inverts `export.checkpoints.checkpoint.half_split` row by row: row 2i is the first of pair i, row 2i + 1 the
    second.
    """
    rows = weight.shape[0]
    width = rows // n_heads
    order = [h * width + i + half * width // 2 for h in range(n_heads) for i in range(width // 2) for half in (0, 1)]
    return weight[order]


def write_llama2c(model: Llama, path: Path, version: int) -> Path:
    """Writes a model as llama2.c's export.py does; version 0 is the legacy layout."""
    config = model.config
    state = model.state_dict()
    for name in state:
        if name.endswith("wq.weight"):
            state[name] = interleaved(state[name], config.n_heads)
        elif name.endswith("wk.weight"):
            state[name] = interleaved(state[name], config.n_kv_heads)

    def per_layer(name: str) -> list[Tensor]:
        return [state[f"layers.{i}.{name}.weight"] for i in range(config.n_layers)]

    attention = [t for name in ("wq", "wk", "wv", "wo") for t in per_layer(f"attention.{name}")]
    feed_forward = [t for name in ("w1", "w2", "w3") for t in per_layer(f"feed_forward.{name}")]
    norms, embedding = (per_layer("attention_norm"), per_layer("ffn_norm")), state["tok_embeddings.weight"]
    head = [] if config.tied else [state["head.output.weight"]]
    dims = [config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads]
    if version == 0:
        vocab = config.vocab_size if config.tied else -config.vocab_size
        header = struct.pack("<7i", *dims, vocab, config.context)
        tables = list(rope.tables(config, config.context))
        tensors = [
            embedding,
            *norms[0],
            *attention,
            *norms[1],
            *feed_forward,
            state["head.norm.weight"],
            *tables,
            *head,
        ]
    else:
        header = struct.pack("<Ii7iB", 0x616B3432, 1, *dims, config.vocab_size, config.context, config.tied)
        header = header.ljust(256, b"\0")
        tensors = [*norms[0], *norms[1], state["head.norm.weight"], embedding, *attention, *feed_forward, *head]
    path.write_bytes(header + b"".join(t.contiguous().numpy().tobytes() for t in tensors))
    return path


def hugging_face_state(model: Llama) -> dict[str, Tensor]:
    """Returns the model's weights under Hugging Face's names."""
    state = {renamed(name, HUGGING_FACE_NAMES): t.contiguous() for name, t in model.state_dict().items()}
    if model.config.tied:
        del state["lm_head.weight"]
    return state


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """Saves copies of the tensors, because safetensors refuses tensors that share storage."""
    save_file({name: torch.clone(t) for name, t in state.items()}, path)


def write_meta(model: Llama, folder: Path, ranks: int, vocabulary_parallel: bool = True) -> Path:
    """Writes a folder in Meta's layout with `ranks` tensor-parallel files. The embedding is split by rows (Llama 3) or
    by columns (Llama 2).
    """
    config = model.config
    split = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
    split["tok_embeddings"] = 0 if vocabulary_parallel else 1
    shards: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in model.state_dict().items():
        kind = name.split(".")[-2]
        if kind in ("wq", "wk"):
            tensor = interleaved(tensor, config.n_heads if kind == "wq" else config.n_kv_heads)
        parts = tensor.chunk(ranks, split[kind]) if kind in split else [tensor] * ranks
        for shard, part in zip(shards, parts, strict=True):
            shard[renamed(name, META_NAMES)] = part.clone()
    folder.mkdir(exist_ok=True)
    for rank, shard in enumerate(shards):
        torch.save(shard | {"rope.freqs": torch.ones(config.head_dim // 2)}, folder / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": -1,
        "multiple_of": 256,
    }
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def write_gguf(
    model: Llama,
    path: Path,
    kind: str | Callable[[str], str],
    rope_factors: Tensor | None = None,
    add_tokenizer: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    most_tensors: int = 0,
) -> Path:
    """A GGUF file; `kind` is the type of its matrices, or gives it for a name: F32, F16, BF16, or one in blocks. With
    a largest number of tensors, it is split into parts of so many.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=most_tensors)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if config.n_experts:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.n_chosen_experts)
    add_tokenizer(writer)
    stacked = dict[str, list[Tensor]]()
    for name, tensor in model.state_dict().items():
        layer_kind = name.split(".")[-2]
        if layer_kind in ("wq", "wk"):
            tensor = interleaved(tensor, config.n_heads if layer_kind == "wq" else config.n_kv_heads)
        if name == "head.output.weight" and config.tied:
            continue
        target = renamed(name, GGUF_NAMES)
        if "_exps." in target:
            stacked.setdefault(target, []).append(tensor)
            if len(stacked[target]) < config.n_experts:
                continue
            tensor = torch.stack(stacked[target])
        is_float = tensor.dim() == 1 or layer_kind == "router"
        chosen = "F32" if is_float else kind(name) if callable(kind) else kind
        storage = gguf.GGMLQuantizationType[chosen]
        is_ours = chosen.endswith("_K")  # which the package reads but does not write
        values = tensor.contiguous().numpy()
        data = blocks_of(tensor, chosen).numpy() if is_ours else gguf.quants.quantize(values, storage)
        writer.add_tensor(target, data, raw_dtype=storage)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
