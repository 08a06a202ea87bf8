"""Random models of every supported family, made by transformers."""

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
MPT_DIMS = {"vocab_size": 160, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}


@dataclass(frozen=True)
class Case:
    """A random model: its architecture, and the settings that differ from the dimensions above.

    Attributes:
        exported: whether the default run also exports it; the others are exported by the slow tests.
        norms: factor of the norms' weights.
    """

    architecture: str
    settings: dict[str, Any] = field(default_factory=dict)
    exported: bool = False
    norms: float = 1.0


def rope(kind: str, **parameters: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | parameters}


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
    "GPT-2": Case("GPT2LMHeadModel", exported=True),
    "GPT-2, unscaled, wide, untied": Case(
        "GPT2LMHeadModel",
        {"scale_attn_weights": False, "n_inner": 40, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
    "MPT": Case("MptForCausalLM", exported=True),
    "MPT, six heads": Case("MptForCausalLM", {"d_model": 48, "n_heads": 6, "attn_config": {"softmax_scale": 0.5}}),
    "CodeGen": Case("CodeGenForCausalLM", {"rotary_dim": 4}, exported=True),
    "CodeGen, two heads a turn": Case("CodeGenForCausalLM", {"n_head": 8, "n_embd": 64, "rotary_dim": 8}),
    "GPT-J": Case("GPTJForCausalLM", {"rotary_dim": 4}),
    "GPT-J, tied": Case("GPTJForCausalLM", {"rotary_dim": 8, "tie_word_embeddings": True, "n_inner": 40}),
}


def dimensions(architecture: str) -> dict[str, Any]:
    if architecture == "MptForCausalLM":
        return MPT_DIMS
    return GPT_DIMS if architecture in ("GPT2LMHeadModel", "CodeGenForCausalLM", "GPTJForCausalLM") else LLAMA_DIMS


def hugging_face_model(case: Case, seed: int = 1) -> Any:
    """Returns the case's model with random weights, large enough for logits of order 1 that differ between tokens."""
    model_class = getattr(transformers, case.architecture)
    config = model_class.config_class(**dimensions(case.architecture) | case.settings)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = model_class(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5).mul_(case.norms).sub_(1.0 if "Gemma" in case.architecture else 0.0)
        else:
            parameter.normal_(0, 0.3 if any(part.isdigit() for part in name.split(".")) else 0.2)
    return model
