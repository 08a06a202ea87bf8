"""Random models of every GGUF architecture, written as llama.cpp's converter writes them: with the gguf package's own
table of tensor names, and the same reordering of weights.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from export.checkpoints.gguf_families import WINDOW
from tests.support.checkpoints import interleaved
from tests.support.families import CASES, DIVISORS, Case, hugging_face_model, layered_rope, rope

Change = Callable[[Any, str, Tensor], Tensor]
"""Returns a weight as GGUF has it, from the model's configuration and the weight's name in transformers."""

Add = Callable[[gguf.GGUFWriter], None]
"""Adds a tokenizer to a file."""


def as_is(config: Any, name: str, weight: Tensor) -> Tensor:
    return weight


def permuted(config: Any, name: str, weight: Tensor) -> Tensor:
    """Interleaves rotary pairs, as for Meta's layout."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return interleaved(weight, heads[role]) if (role := name.split(".")[-2]) in heads else weight


def plus_one(config: Any, name: str, weight: Tensor) -> Tensor:
    return weight + 1 if name.endswith("norm.weight") else weight


def ungrouped(config: Any, name: str, weight: Tensor) -> Tensor:
    """Puts all queries before all keys and these before all values, which transformers stores by KV head."""
    if "query_key_value" not in name:
        return weight
    heads = config.num_attention_heads
    groups = getattr(config, "num_kv_heads", heads)
    by_group = weight.unflatten(0, (groups, heads // groups + 2, -1))
    return torch.cat([by_group[:, :-2].flatten(0, 2), by_group[:, -2].flatten(0, 1), by_group[:, -1].flatten(0, 1)])


def transposed(config: Any, name: str, weight: Tensor) -> Tensor:
    return weight.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight


@dataclass(frozen=True)
class GGUFCase:
    """A random model as GGUF.

    Attributes:
        architecture: GGUF's name of the architecture.
        case: the model.
        change: what the converter does to weights.
        fields: fields that not all architectures have, without the name of the architecture.
    """

    architecture: str
    case: Case
    change: Change = as_is
    fields: Mapping[str, Any] = field(default_factory=dict)


_GROUPED = {"num_key_value_heads": 2}
_LOCAL_OF_THREE = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_GEMMA = _GROUPED | {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}
_GEMMA3_ROPE = layered_rope({"rope_theta": 1000.0}, rope_type="linear", factor=4.0, rope_theta=1e6)
_OLMO3_ROPE = layered_rope(
    {"rope_theta": 5e5}, rope_type="yarn", factor=4.0, rope_theta=5e5, original_max_position_embeddings=16
)
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
_GRANITE = {"embedding_scale": 6.0, "residual_scale": 0.4, "attention.scale": 0.2, "logit_scale": 4.0}
_MINICPM = {"embedding_scale": 6.0, "residual_scale": 0.7 / math.sqrt(3), "logit_scale": 4.0}
_LONGROPE = {"rope.scaling.attn_factor": math.sqrt(1 + math.log(256 / 16) / math.log(16))}
_LONGROPE |= {"rope.scaling.original_context_length": 16}
_PARTIAL = rope("default", partial_rotary_factor=0.5)
_WIDE = {"feed_forward_length": 128}

GGUF_CASES = {
    "Llama": GGUFCase("llama", CASES["Llama 3, grouped"], permuted),
    "Llama with biases": GGUFCase("llama", CASES["Llama with biases"], permuted),
    "Mistral 3": GGUFCase("mistral3", CASES["Mistral without a window"], permuted),
    "Qwen 2": GGUFCase("qwen2", CASES["Qwen 2"]),
    "Qwen 2, yarn": GGUFCase(
        "qwen2",
        Case("Qwen2ForCausalLM", _GROUPED | rope("yarn", factor=4.0, original_max_position_embeddings=16)),
        fields=_YARN,
    ),
    "Qwen 3": GGUFCase("qwen3", Case("Qwen3ForCausalLM", _GROUPED | {"head_dim": 12}, norms=1.5)),
    "Phi-3": GGUFCase("phi3", CASES["Phi-3"], fields={WINDOW: 8}),
    "Phi-3, no window": GGUFCase(
        "phi3", Case("Phi3ForCausalLM", _PARTIAL), fields={WINDOW: 0, "rope.dimension_count": 4}
    ),
    "Phi-3, LongRoPE": GGUFCase("phi3", CASES["Phi-3, LongRoPE beyond"], fields=_LONGROPE),
    "Gemma": GGUFCase("gemma", CASES["Gemma"], plus_one),
    "Gemma 2": GGUFCase(
        "gemma2",
        Case(
            "Gemma2ForCausalLM",
            _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0},
            norms=2.0,
        ),
        plus_one,
        {WINDOW: 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0},
    ),
    "Gemma 2, 27B": GGUFCase(
        "gemma2",
        Case("Gemma2ForCausalLM", _GEMMA | {"num_hidden_layers": 46, "query_pre_attn_scalar": 8}),
        plus_one,
        {WINDOW: 8},
    ),
    "Gemma 3": GGUFCase(
        "gemma3",
        Case(
            "Gemma3ForCausalLM", _GEMMA | {"num_hidden_layers": 7, "sliding_window_pattern": 6} | _GEMMA3_ROPE, norms=2
        ),
        plus_one,
        {WINDOW: 8, "rope.freq_base_swa": 1000.0, "rope.scaling.factor": 4.0},
    ),
    "SmolLM 3": GGUFCase("smollm3", Case("SmolLM3ForCausalLM", _GROUPED | {"num_hidden_layers": 5}), permuted),
    "Granite": GGUFCase("granite", CASES["Granite"], permuted, _GRANITE),
    "MiniCPM": GGUFCase("minicpm", CASES["MiniCPM"], permuted, _MINICPM),
    "OLMo 2": GGUFCase("olmo2", CASES["OLMo 2"]),
    "OLMo 3": GGUFCase(
        "olmo2",
        Case("Olmo3ForCausalLM", _GROUPED | _LOCAL_OF_THREE | _OLMO3_ROPE, norms=1.5),
        fields=_YARN | {WINDOW: 8, "attention.sliding_window_pattern": [True, True, False]},
    ),
    "EXAONE 4": GGUFCase("exaone4", CASES["EXAONE 4 without windows"]),
    "EXAONE 4, 32B": GGUFCase(
        "exaone4",
        Case("Exaone4ForCausalLM", _GROUPED | {"num_hidden_layers": 64, "sliding_window": 8}),
        fields={WINDOW: 8},
    ),
    "GLM": GGUFCase(
        "chatglm",
        Case("GlmForCausalLM", _GROUPED | {"head_dim": 8, "eos_token_id": 2} | _PARTIAL),
        fields={"rope.dimension_count": 4},
    ),
    "GLM-4": GGUFCase("glm4", CASES["GLM-4"], fields={"rope.dimension_count": 4}),
    "Ernie 4.5": GGUFCase("ernie4_5", Case("Ernie4_5ForCausalLM", _GROUPED | {"head_dim": 12})),
    "Seed-OSS": GGUFCase("seed_oss", CASES["Seed-OSS"]),
    "Arcee": GGUFCase("arcee", CASES["Arcee"], permuted),
    "InternLM 2": GGUFCase("internlm2", CASES["Llama 3, grouped"], permuted),
    "GPT-2": GGUFCase("gpt2", CASES["GPT-2"], transposed),
    "StarCoder": GGUFCase("starcoder", CASES["GPTBigCode"], fields={"attention.head_count_kv": 1}),
    "GPT-NeoX": GGUFCase(
        "gptneox", CASES["GPT-NeoX"], ungrouped, {"use_parallel_residual": True, "rope.dimension_count": 2}
    ),
    "GPT-NeoX, blocks in turn": GGUFCase(
        "gptneox", CASES["GPT-NeoX, blocks in turn"], ungrouped, {"use_parallel_residual": False}
    ),
    "Falcon": GGUFCase(
        "falcon", Case("FalconForCausalLM", {"num_kv_heads": 1}), fields=_WIDE | {"attention.head_count_kv": 1}
    ),
    "Falcon, two norms": GGUFCase(
        "falcon", CASES["Falcon, new decoder"], ungrouped, _WIDE | {"attention.head_count_kv": 2}
    ),
    "BLOOM": GGUFCase("bloom", CASES["BLOOM"], ungrouped, _WIDE),
    "Phi-2": GGUFCase("phi2", Case("PhiForCausalLM"), fields={"rope.dimension_count": 4}),
    "StableLM": GGUFCase("stablelm", CASES["StableLM"], fields={"rope.dimension_count": 2}),
    "StableLM, parallel": GGUFCase("stablelm", CASES["StableLM, parallel"], fields={"rope.dimension_count": 2}),
    "StarCoder 2": GGUFCase("starcoder2", Case("Starcoder2ForCausalLM", {"sliding_window": None})),
    "Nemotron": GGUFCase("nemotron", CASES["Nemotron"], plus_one, {"rope.dimension_count": 4}),
    "Jais 2": GGUFCase("jais2", CASES["Jais 2"]),
    "Cohere": GGUFCase("command-r", CASES["Cohere"], fields={"logit_scale": 0.5}),
    "Cohere 2": GGUFCase(
        "cohere2",
        Case("Cohere2ForCausalLM", {"logit_scale": 0.5, "num_hidden_layers": 5, "sliding_window": 8} | _GROUPED),
        fields={"logit_scale": 0.5, WINDOW: 8},
    ),
    "MPT": GGUFCase("mpt", CASES["MPT"], fields={"attention.max_alibi_bias": 8.0}),
}

_SETTINGS = {
    "context_length": ("max_position_embeddings", "seq_length", "max_seq_len"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
}
"""Maps fields to the names of settings in transformers: the first that a model has."""


def fields_of(case: GGUFCase, config: Any) -> dict[str, Any]:
    settings = config.to_dict() | {name: getattr(config, name, None) for name in config.attribute_map}
    found = {key: next(filter(None, map(settings.get, names)), None) for key, names in _SETTINGS.items()}
    rotary = settings.get("rope_parameters") or {}
    found["feed_forward_length"] = settings.get("intermediate_size") or 4 * settings["hidden_size"]
    found["rope.freq_base"] = rotary.get("full_attention", rotary).get("rope_theta")
    return {key: value for key, value in (found | case.fields).items() if value is not None}


def write(case: GGUFCase, path: Path, kind: str = "F32", model: Any = None) -> Path:
    """Writes a case's model, with matrices of the given type."""
    model = model or hugging_face_model(case.case)
    config = model.config
    writer = gguf.GGUFWriter(path, case.architecture)
    for key, value in fields_of(case, config).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(f"{case.architecture}.{key}", value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[case.architecture]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shorter = name.removeprefix("transformer.")  # so is BLOOM's in the table
        theirs = next(filter(None, (names.get_name(known, (".weight", ".bias")) for known in (name, shorter))))
        matrix = weight.dim() == 2 and "norm" not in name and "wpe" not in name
        storage = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        values = case.change(config, name, weight).contiguous().numpy()
        writer.add_tensor(theirs, gguf.quants.quantize(values, storage), raw_dtype=storage)
    if case.case == CASES["Phi-3, LongRoPE beyond"]:
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", torch.tensor(DIVISORS[f"{length}_factor"]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


COMPARED = [name for name, case in GGUF_CASES.items() if not case.fields.get(WINDOW) or case.architecture != "phi3"]
"""The cases that llama.cpp computes as transformers does: it leaves out Phi-3's window."""


def adds_byte_level(tokens: list[str], merges: list[tuple[str, str]], specials: set[str], pre: str) -> Add:
    """Returns a function that adds a byte-level BPE tokenizer, as llama.cpp's converter does."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in specials else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in merges])

    return add
