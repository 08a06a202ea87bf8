"""Reader of GGUF files of the `llama` architecture. Quantised tensors are dequantised as they are read."""

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
    Storage,
    StoredBlocks,
    TensorSource,
    match,
    read_head,
    renamed,
    token_ids,
)
from export.checkpoints.gguf_file import MAGIC, GGUFTensor, read_gguf
from export.checkpoints.gguf_tokenizer import STARTS_TEXTS, TOKENIZER, tokenizer_bytes
from model.block_linear import BLOCK_FORMS
from model.config import ModelConfig, RopeScaling
from model.errors import InputError
from model.rotary import llama3_scaled

GGUF_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "layers.*.attention_norm.weight": "blk.*.attn_norm.weight",
    "layers.*.attention.wq.weight": "blk.*.attn_q.weight",
    "layers.*.attention.wk.weight": "blk.*.attn_k.weight",
    "layers.*.attention.wv.weight": "blk.*.attn_v.weight",
    "layers.*.attention.wo.weight": "blk.*.attn_output.weight",
    "layers.*.ffn_norm.weight": "blk.*.ffn_norm.weight",
    "layers.*.feed_forward.w1.weight": "blk.*.ffn_gate.weight",
    "layers.*.feed_forward.w2.weight": "blk.*.ffn_down.weight",
    "layers.*.feed_forward.w3.weight": "blk.*.ffn_up.weight",
    "layers.*.feed_forward.router.weight": "blk.*.ffn_gate_inp.weight",
    "layers.*.feed_forward.experts.*.w1.weight": "blk.*.ffn_gate_exps.weight",
    "layers.*.feed_forward.experts.*.w2.weight": "blk.*.ffn_down_exps.weight",
    "layers.*.feed_forward.experts.*.w3.weight": "blk.*.ffn_up_exps.weight",
    "head.norm.weight": "output_norm.weight",
    "head.output.weight": "output.weight",
}
"""Maps our weight names to GGUF's, with stars for the numbers of the layer and of an expert. One tensor has the
matrices of all experts.
"""

_ROPE_FACTORS = "rope_freqs.weight"
_NO_WEIGHTS = {GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")}


def is_gguf(path: Path) -> bool:
    """Returns whether the file starts with GGUF's magic number."""
    return read_head(path, len(MAGIC)) == MAGIC


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file. Rotary pairs are interleaved in the file; wq and wk are reordered as they are read.

    Raises:
        InputError: the file is damaged, incomplete, or cannot be exported.
    """
    try:
        file = read_gguf(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, struct.error, MemoryError, OverflowError) as error:
        raise InputError(f"{path} is truncated or not a GGUF file ({error}); download it again") from error
    fields = file.fields
    if (parts := fields.get("split.count", 1)) > 1:
        number = fields.get("split.no", 0) + 1
        raise InputError(
            f"{path} is part {number} of {parts}; merge the parts first: llama-gguf-split --merge PART1 OUTPUT"
        )
    config = _config(path, fields, file.tensors)
    sources = {
        name: TensorSource(tensor.shape, partial(_read, tensor), tensor.kind not in _NO_WEIGHTS)
        for name, tensor in file.tensors.items()
    }
    storage = Storage(GGUF_NAMES, interleaved=True)
    weights = match(path, config, sources, storage, {_ROPE_FACTORS})
    raw = {name: replace(source, read=partial(_read_blocks, file.tensors[name])) for name, source in sources.items()}
    stored = match(path, config, raw, storage, {_ROPE_FACTORS})
    types = {name: file.tensors[renamed(name, GGUF_NAMES)].kind.name for name in stored}
    bos, eos, eot, eom = (
        token_ids(fields.get(key), key, path, config.vocab_size)
        for key in (f"{TOKENIZER}{name}_token_id" for name in ("bos", "eos", "eot", "eom"))
    )
    starts = fields.get(f"{TOKENIZER}model") != "gpt2" or fields.get(f"{TOKENIZER}pre") in STARTS_TEXTS
    adds = bool(fields.get(f"{TOKENIZER}add_bos_token", starts))
    return Checkpoint(
        config,
        weights,
        (path,),
        "GGUF",
        architecture=fields["general.architecture"],
        bos_id=bos[0] if bos and adds else None,
        adds_bos=adds,
        stop_ids=tuple(dict.fromkeys(eos + eot + eom)),
        tokenizer=partial(_tokenizer, path, fields) if f"{TOKENIZER}model" in fields else None,
        chat=_chat(fields, bos, eos),
        warnings=_warnings(path, fields),
        types=types,
        blocks={
            name: StoredBlocks(kind, partial(stored.__getitem__, name))
            for name, kind in types.items()
            if kind in BLOCK_FORMS
        },
    )


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


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, GGUFTensor]) -> ModelConfig:
    if (architecture := fields.get("general.architecture")) != "llama":
        raise InputError(f"{path} has the unsupported architecture {architecture!r}; give a file with 'llama'")
    try:
        dim, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
        theta = float(fields.get("llama.rope.freq_base", 10000.0))
        context, head_dim = fields["llama.context_length"], fields.get("llama.attention.key_length", dim // heads)
        rotated = fields.get("llama.rope.dimension_count", head_dim)
        stretched = _linear(path, fields, context)
        return ModelConfig(
            dim=dim,
            n_layers=fields["llama.block_count"],
            n_heads=heads,
            n_kv_heads=fields.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            hidden_dim=fields["llama.feed_forward_length"],
            vocab_size=tensors["token_embd.weight"].shape[0],
            context=context,
            norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
            rope_theta=theta,
            rope_scaling=_scaling(path, tensors[_ROPE_FACTORS], theta) if _ROPE_FACTORS in tensors else stretched,
            rotary_dim=None if rotated == head_dim else rotated,
            tied="output.weight" not in tensors,
            n_experts=fields.get("llama.expert_count", 0),
            n_chosen_experts=fields.get("llama.expert_used_count", 0),
        )
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}; convert the checkpoint again") from error
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path} has an invalid dimension ({error}); convert the checkpoint again") from error


def _linear(path: Path, fields: dict[str, Any], context: int) -> RopeScaling | None:
    """Returns the linear scaling given in the fields, under the current key or that of the first GGUF files, as
    llama.cpp does.

    Raises:
        InputError: the fields give another kind of scaling.
    """
    factor = float(fields.get("llama.rope.scaling.factor") or fields.get("llama.rope.scale_linear") or 1)
    kind = fields.get("llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise InputError(f"{path} has the unsupported rope scaling {kind!r}; give a file with linear or Llama 3.1's")
    return None if kind == "none" or factor == 1 else RopeScaling("linear", factor, original_context=context)


def _scaling(path: Path, tensor: GGUFTensor, theta: float) -> RopeScaling:
    """Returns Llama 3.1's scaling, which GGUF stores as a divisor of each frequency, [Dh/2], from 1 to the factor.

    Raises:
        InputError: the divisors are not those of Llama 3.1's formula.
    """
    divisors = _read(tensor, ())
    scaling = RopeScaling("llama3", float(divisors.max()), original_context=8192)
    pairs = len(divisors)
    frequencies = theta ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
    if not torch.allclose(frequencies / llama3_scaled(frequencies, scaling), divisors, rtol=1e-3):
        raise InputError(f"{path} has rotary frequency factors other than Llama 3.1's; give another file")
    return scaling


def _read(tensor: GGUFTensor, index: Index) -> Tensor:
    return torch.from_numpy(tensor.read(index))


def _read_blocks(tensor: GGUFTensor, index: Index) -> Tensor:
    return torch.from_numpy(tensor.blocks())[index]
