"""Random models of every supported family, made by transformers."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

LLAMA_DIMS = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT_DIMS = {
    "vocab_size": 160,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT_NEO_DIMS = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1], [["global"], 1]],
    "bos_token_id": 1,
    "eos_token_id": None,
}
MPT_DIMS = {"vocab_size": 160, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}


@dataclass(frozen=True)
class Case:
    """A random model: its architecture, and the settings that differ from the dimensions above.

    Attributes:
        saved_as: architecture that transformers does not have and that computes the same; `tests.support.saved`
            writes a checkpoint of it.
        exported: whether the default run also exports it; the others are exported by the slow tests.
        norms: factor of the norms' weights.
    """

    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)
    exported: bool = False
    norms: float = 1.0
    saved_as: str = ""


def rope(kind: str, **parameters: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | parameters}


def layered_rope(local: dict[str, object], **full: object) -> dict[str, Any]:
    """Returns the rotary settings of local blocks and of those that see everything."""
    return {"rope_parameters": {"full_attention": full, "sliding_attention": {"rope_type": "default"} | local}}


DIVISORS = {
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
}

CASES = {
    "Llama 2": Case("LlamaForCausalLM"),
    "Llama 3, grouped": Case("LlamaForCausalLM", {"num_key_value_heads": 2} | rope("default", rope_theta=500000.0)),
    "Llama 3.2, tied and scaled": Case(
        "LlamaForCausalLM",
        {"num_key_value_heads": 2, "tie_word_embeddings": True}
        | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "Code Llama": Case("LlamaForCausalLM", rope("default", rope_theta=1e6)),
    "Llama with biases": Case("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "Llama, wide heads": Case("LlamaForCausalLM", {"head_dim": 12}),
    "Llama, GELU": Case("LlamaForCausalLM", {"hidden_act": "gelu"}),
    "Llama, linear scaling": Case("LlamaForCausalLM", rope("linear", factor=4.0)),
    "Llama, dynamic scaling within": Case("LlamaForCausalLM", rope("dynamic", factor=4.0)),
    "Llama, dynamic scaling beyond": Case(
        "LlamaForCausalLM", {"max_position_embeddings": 16} | rope("dynamic", factor=4.0)
    ),
    "Llama, yarn": Case("LlamaForCausalLM", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "Llama, yarn as it may be set": Case(
        "LlamaForCausalLM",
        rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=2.0, truncate=False)
        | {"num_key_value_heads": 1},
    ),
    "Mistral": Case("MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": 8}),
    "Mistral without a window": Case("MistralForCausalLM", {"num_key_value_heads": 2, "sliding_window": None}),
    "Mixtral": Case(
        "MixtralForCausalLM",
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2},
        exported=True,
    ),
    "Mixtral, three of five experts, window": Case(
        "MixtralForCausalLM",
        {"num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 8},
    ),
    "Qwen 2": Case("Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "Qwen 2, upper windows": Case(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "Qwen 2, windows as listed": Case(
        "Qwen2ForCausalLM",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "Qwen 3": Case(
        "Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 12, "attention_bias": True}, exported=True, norms=1.5
    ),
    "Phi-3": Case("Phi3ForCausalLM", {"num_key_value_heads": 2, "sliding_window": 8}, exported=True),
    "Phi-3, partly rotated": Case("Phi3ForCausalLM", rope("default", partial_rotary_factor=0.5)),
    "Phi-3, LongRoPE within": Case(
        "Phi3ForCausalLM",
        {"original_max_position_embeddings": 64, "max_position_embeddings": 256} | rope("longrope", **DIVISORS),
    ),
    "Phi-3, LongRoPE beyond": Case(
        "Phi3ForCausalLM",
        {"original_max_position_embeddings": 16, "max_position_embeddings": 256} | rope("longrope", **DIVISORS),
    ),
    "Gemma": Case("GemmaForCausalLM", {"num_key_value_heads": 1, "head_dim": 12}),
    "Gemma 2": Case(
        "Gemma2ForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
        },
        exported=True,
        norms=2.0,
    ),
    "Gemma 2 without caps, one local layer": Case(
        "Gemma2ForCausalLM",
        {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        norms=3.0,
    ),
    "SmolLM 3": Case(
        "SmolLM3ForCausalLM", {"num_key_value_heads": 2, "no_rope_layer_interval": 2}, exported=True, norms=1.5
    ),
    "SmolLM 3, NoPE as listed, with windows": Case(
        "SmolLM3ForCausalLM",
        {
            "num_key_value_heads": 2,
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 8,
            "mlp_bias": True,
            "attention_bias": True,
        },
    ),
    "Granite": Case(
        "GraniteForCausalLM",
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
        exported=True,
    ),
    "Mistral 3, language model": Case(
        "Mistral3ForConditionalGeneration", {"text_config": {"model_type": "mistral", "num_key_value_heads": 2}}
    ),
    "Ministral": Case(
        "MinistralForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "VaultGemma": Case(
        "VaultGemmaForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 8},
        norms=2.0,
    ),
    "Gemma 3": Case(
        "Gemma3ForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 8}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | layered_rope({"rope_theta": 1000.0}, rope_type="linear", factor=4.0, rope_theta=1e6),
        exported=True,
        norms=2.0,
    ),
    "Gemma 3, language model": Case(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 8}
            | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        },
        norms=2.0,
    ),
    "HyperCLOVA X": Case(
        "HyperCLOVAXForCausalLM",
        {"num_key_value_heads": 2, "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 0.25},
    ),
    "OLMo 2": Case("Olmo2ForCausalLM", {"num_key_value_heads": 2}, exported=True, norms=1.5),
    "OLMo 3": Case(
        "Olmo3ForCausalLM",
        {"num_key_value_heads": 2, "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        | layered_rope(
            {"rope_theta": 1000.0}, rope_type="yarn", factor=4.0, rope_theta=5e5, original_max_position_embeddings=16
        ),
        norms=1.5,
    ),
    "EXAONE 4": Case(
        "Exaone4ForCausalLM",
        {"num_key_value_heads": 2, "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        norms=1.5,
    ),
    "EXAONE 4 without windows": Case(
        "Exaone4ForCausalLM",
        {"num_key_value_heads": 2, "sliding_window": None, "layer_types": ["full_attention"] * 3},
        norms=1.5,
    ),
    "GLM": Case(
        "GlmForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 12, "eos_token_id": 2} | rope("default", partial_rotary_factor=0.5),
    ),
    "GLM-4": Case(
        "Glm4ForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 2} | rope("default", partial_rotary_factor=0.5),
    ),
    "Ernie 4.5": Case("Ernie4_5ForCausalLM", {"num_key_value_heads": 2, "head_dim": 12, "use_bias": True}),
    "Helium": Case("HeliumForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
    "Seed-OSS": Case("SeedOssForCausalLM", {"num_key_value_heads": 2, "head_dim": 12}),
    "Arcee": Case("ArceeForCausalLM", {"num_key_value_heads": 2}),
    "Apertus": Case(
        "ApertusForCausalLM",
        {"num_key_value_heads": 2}
        | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "CWM": Case(
        "CwmForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "eos_token_id": 2,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "InternLM 2": Case("LlamaForCausalLM", {"num_key_value_heads": 2}, saved_as="InternLM2ForCausalLM"),
    "MiniCPM": Case(
        "GraniteForCausalLM",
        {
            "num_key_value_heads": 2,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.7 / math.sqrt(3),
            "attention_multiplier": 8**-0.5,
            "logits_scaling": 4.0,
        },
        saved_as="MiniCPMForCausalLM",
    ),
    "GPT-2": Case("GPT2LMHeadModel", exported=True),
    "GPT-2, unscaled, wide, untied": Case(
        "GPT2LMHeadModel",
        {"scale_attn_weights": False, "n_inner": 40, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
    "GPTBigCode": Case("GPTBigCodeForCausalLM"),
    "GPTBigCode, a KV head per head": Case("GPTBigCodeForCausalLM", {"multi_query": False, "n_inner": 40}),
    "GPT-Neo": Case("GPTNeoForCausalLM", {"window_size": 8}),
    "OPT": Case("OPTForCausalLM", {"ffn_dim": 48}),
    "GPT-NeoX": Case("GPTNeoXForCausalLM"),
    "GPT-NeoX, blocks in turn": Case(
        "GPTNeoXForCausalLM", {"use_parallel_residual": False} | rope("default", partial_rotary_factor=1.0)
    ),
    "Falcon": Case("FalconForCausalLM", {"ffn_hidden_size": 48}),
    "Falcon, new decoder": Case("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, new decoder with one norm": Case(
        "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
    ),
    "Falcon, blocks in turn, biases": Case(
        "FalconForCausalLM", {"parallel_attn": False, "multi_query": False, "bias": True}
    ),
    "BLOOM": Case("BloomForCausalLM", {"tie_word_embeddings": False}),
    "BLOOM, six heads": Case(
        "BloomForCausalLM", {"hidden_size": 48, "num_attention_heads": 6, "tie_word_embeddings": False}
    ),
    "Phi-2": Case("PhiForCausalLM", {"num_key_value_heads": 2}),
    "StableLM": Case("StableLmForCausalLM", {"num_key_value_heads": 2, "use_qkv_bias": True}),
    "StableLM, parallel": Case("StableLmForCausalLM", {"num_key_value_heads": 4, "use_parallel_residual": True}),
    "StarCoder 2": Case("Starcoder2ForCausalLM", {"sliding_window": 8}),
    "Nemotron": Case("NemotronForCausalLM", {"num_key_value_heads": 2}),
    "Jais 2": Case("Jais2ForCausalLM", {"num_key_value_heads": 2}),
    "Cohere": Case("CohereForCausalLM", {"logit_scale": 0.5, "num_key_value_heads": 2}),
    "Cohere, normalised queries and keys": Case(
        "CohereForCausalLM", {"logit_scale": 0.5, "num_key_value_heads": 2, "use_qk_norm": True}, exported=True
    ),
    "Cohere 2": Case(
        "Cohere2ForCausalLM",
        {"logit_scale": 0.5, "num_key_value_heads": 2, "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "MPT": Case("MptForCausalLM", exported=True),
    "MPT, six heads": Case("MptForCausalLM", {"d_model": 48, "n_heads": 6, "attn_config": {"softmax_scale": 0.5}}),
    "CodeGen": Case("CodeGenForCausalLM", {"rotary_dim": 4}, exported=True),
    "CodeGen, two heads a turn": Case("CodeGenForCausalLM", {"n_head": 8, "n_embd": 64, "rotary_dim": 8}),
    "GPT-J": Case("GPTJForCausalLM", {"rotary_dim": 4}),
    "GPT-J, tied": Case("GPTJForCausalLM", {"rotary_dim": 8, "tie_word_embeddings": True, "n_inner": 40}),
}


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def dimensions(architecture: str) -> dict[str, Any]:
    if architecture == "MptForCausalLM":
        return MPT_DIMS
    if architecture == "GPTNeoForCausalLM":
        return GPT_NEO_DIMS
    if architecture.endswith("ConditionalGeneration"):
        return {"text_config": LLAMA_DIMS, "vision_config": VISION, "image_token_index": 159}
    gpt = ("GPT2LMHeadModel", "GPTBigCodeForCausalLM", "CodeGenForCausalLM", "GPTJForCausalLM")
    return GPT_DIMS if architecture in gpt else LLAMA_DIMS


def hugging_face_model(case: Case, seed: int = 1) -> Any:
    """Returns the case's model with random weights, large enough for logits of order 1 that differ between tokens."""
    model_class = getattr(transformers, case.architecture)
    settings = dict(dimensions(case.architecture))
    for key, value in case.settings.items():
        settings[key] = settings.get(key, {}) | value if key == "text_config" else value
    config = model_class.config_class(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = model_class(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # some families have one even if the configuration says None
    offset = 1.0 if any(name in case.architecture for name in ("Gemma", "Nemotron")) else 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5).mul_(case.norms).sub_(offset)
        else:
            parameter.normal_(0, 0.3 if any(part.isdigit() for part in name.split(".")) else 0.2)
    return model
