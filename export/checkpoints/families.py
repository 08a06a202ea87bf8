"""The model families of Hugging Face checkpoints, by the name of the architecture.

A family defines the meaning of its keys in config.json, their default values, the features common to all its models,
and the storage of its weights. Names, defaults and meanings are those of transformers' configuration and modelling
modules.
"""

import math
from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from export.checkpoints.checkpoint import Storage
from export.checkpoints.family import (
    ACTIVATIONS,
    Family,
    Key,
    Settings,
    all_but_every_nth,
    every_layer,
)
from export.checkpoints.gpt_families import GPT_FAMILIES
from export.checkpoints.weight_names import (
    APERTUS_NAMES,
    GATE_UP_NAMES,
    GEMMA2_NAMES,
    GLM4_NAMES,
    HUGGING_FACE_NAMES,
    HYPERCLOVAX_NAMES,
    INTERNLM2_NAMES,
    MIXTRAL_NAMES,
    PHI3_NAMES,
    POST_NORM_NAMES,
    UNGATED_NAMES,
)


def _every_other(settings: Settings, layer: int) -> bool:
    return layer % 2 == 0


def _upper(settings: Settings, layer: int) -> bool:
    return bool(settings["use_sliding_window"]) and layer >= settings["max_window_layers"]


def _all_but_first_of_four(settings: Settings, layer: int) -> bool:
    return layer % 4 != 0


def _unless_whole(settings: Settings, layer: int, local: bool) -> bool:
    """Returns whether a block of EXAONE 4 has rotary embedding: only local ones have it in models with a window."""
    return local or settings["sliding_window"] is None


def _attention_multiplier(settings: Settings) -> float:
    width = settings["head_dim"] or settings["hidden_size"] // settings["num_attention_heads"]
    return float(settings["attention_multiplier"] or width**-0.5)


def _as_listed(settings: Settings, layer: int, local: bool = False) -> bool:
    """Returns whether a block of SmolLM 3 has rotary embedding: every fourth has none, unless the config lists them."""
    listed = settings["no_rope_layers"]
    return bool(listed[layer] if listed is not None else (layer + 1) % settings["no_rope_layer_interval"])


def _unrotated(settings: Settings, layer: int) -> bool:
    return bool(settings["use_sliding_window"]) and not _as_listed(settings, layer)


_LLAMA_KEYS: dict[str, Key] = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "activation": ("hidden_act", ACTIVATIONS.get),
}
_ATTENTION_BIAS: dict[str, Key] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_BIASES: dict[str, Key] = _ATTENTION_BIAS | {"ffn_bias": "mlp_bias"}

_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_WINDOWS = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA_SCALE: dict[str, Key] = {"embedding_scale": ("hidden_size", math.sqrt)}
_GEMMA_ACTIVATIONS = ACTIVATIONS | {"gelu": "gelu_tanh"}  # the first Gemma configs say gelu where the tanh form is used
_APERTUS_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12e6,
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
_CWM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
_CAUSAL = {"use_bidirectional_attention": (None, False)}

_LLAMA = Storage(HUGGING_FACE_NAMES)
_INTERLEAVED = Storage(HUGGING_FACE_NAMES, interleaved=True)
_POST_NORMS = {"pre_norms": False, "post_norms": True, "qk_norm": True}
_GLM_KEYS = _LLAMA_KEYS | {"qkv_bias": "attention_bias"}
_GLM_DEFAULTS = (
    _LLAMA_DEFAULTS
    | {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7}
    | {"attention_bias": True, "partial_rotary_factor": 0.5}
)
_GEMMA2_KEYS = (
    _LLAMA_KEYS
    | _ATTENTION_BIAS
    | _GEMMA_SCALE
    | {
        "activation": ("hidden_activation", ACTIVATIONS.get),
        "attention_scale": ("query_pre_attn_scalar", lambda scalar: scalar**-0.5),
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    }
)
_GEMMA2_DEFAULTS = (
    _LLAMA_DEFAULTS
    | {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096}
    | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "layer_types": None}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
)
_GEMMA3 = Family(
    _GEMMA2_KEYS,
    Storage(GEMMA2_NAMES, norm_offset=1.0),
    _GEMMA2_DEFAULTS
    | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
    | {"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10000.0}
    | {"sliding_window_pattern": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    features={"post_norms": True, "qk_norm": True},
    only=_CAUSAL,
    local=all_but_every_nth,
)
_MISTRAL = Family(
    _LLAMA_KEYS, _LLAMA, _LLAMA_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096}, local=every_layer
)
_GRANITE_KEYS: dict[str, Key] = (
    _LLAMA_KEYS
    | _BIASES
    | {
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attention_scale": "attention_multiplier",
        "logit_scale": ("logits_scaling", lambda divisor: 1 / divisor),
    }
)
_IMAGES: dict[str, Any] = {
    "sections": ("text_config",),
    "other_parts": {"language_model": ""},
    "unread": ("vision_tower", "multi_modal_projector"),
}
"""Settings of families whose config.json and weights contain a language model among others."""
_MAYBE_TIED: dict[str, Key] = {"tied": lambda settings: True}  # both configurations may say so; the weights decide

FAMILIES = {
    "LlamaForCausalLM": Family(_LLAMA_KEYS | _BIASES, _LLAMA, _LLAMA_DEFAULTS),
    "MistralForCausalLM": _MISTRAL,
    "Mistral3ForConditionalGeneration": replace(
        _MISTRAL, keys=_LLAMA_KEYS | _MAYBE_TIED, only={"model_type": ("mistral",)}, **_IMAGES
    ),
    "MinistralForCausalLM": replace(_MISTRAL, defaults={**_MISTRAL.defaults, "layer_types": None}),
    "MixtralForCausalLM": Family(
        _LLAMA_KEYS | {"n_experts": "num_local_experts", "n_chosen_experts": "num_experts_per_tok"},
        Storage(MIXTRAL_NAMES),
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
        | {"num_local_experts": 8, "num_experts_per_tok": 2},
        local=every_layer,
    ),
    "Qwen2ForCausalLM": Family(
        _LLAMA_KEYS,
        _LLAMA,
        _LLAMA_DEFAULTS | _QWEN_WINDOWS | {"num_key_value_heads": 32},
        features={"qkv_bias": True},
        local=_upper,
    ),
    "Qwen3ForCausalLM": Family(
        _LLAMA_KEYS | _ATTENTION_BIAS,
        _LLAMA,
        _LLAMA_DEFAULTS | _QWEN_WINDOWS | {"num_key_value_heads": 32, "head_dim": 128},
        features={"qk_norm": True},
        local=_upper,
    ),
    "Phi3ForCausalLM": Family(
        _LLAMA_KEYS,
        Storage(PHI3_NAMES),
        _LLAMA_DEFAULTS
        | {"rms_norm_eps": 1e-5, "sliding_window": None}
        | {"original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
        local=every_layer,
        rope_kinds={"su": "longrope", "yarn": "longrope"},
    ),
    "GemmaForCausalLM": Family(
        _LLAMA_KEYS | _ATTENTION_BIAS | _GEMMA_SCALE | {"activation": ("hidden_act", _GEMMA_ACTIVATIONS.get)},
        Storage(HUGGING_FACE_NAMES, norm_offset=1.0),
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        only=_CAUSAL,
    ),
    "Gemma2ForCausalLM": Family(
        _GEMMA2_KEYS,
        Storage(GEMMA2_NAMES, norm_offset=1.0),
        _GEMMA2_DEFAULTS,
        features={"post_norms": True},
        only=_CAUSAL,
        local=_every_other,
    ),
    "VaultGemmaForCausalLM": Family(
        _GEMMA2_KEYS, Storage(GEMMA2_NAMES, norm_offset=1.0), _GEMMA2_DEFAULTS, local=_every_other
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": replace(_GEMMA3, keys=_GEMMA2_KEYS | _MAYBE_TIED, **_IMAGES),
    "SmolLM3ForCausalLM": Family(
        _LLAMA_KEYS | _BIASES,
        _LLAMA,
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6, "layer_types": None}
        | {"use_sliding_window": False, "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
        local=_unrotated,
        rotates=_as_listed,
    ),
    "GraniteForCausalLM": Family(
        _GRANITE_KEYS,
        _LLAMA,
        _LLAMA_DEFAULTS
        | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0},
    ),
    "HyperCLOVAXForCausalLM": Family(
        _GRANITE_KEYS
        | {"logit_scale": "logits_scaling", "post_norms": "use_post_norm", "attention_scale": _attention_multiplier},
        Storage(HYPERCLOVAX_NAMES),
        _LLAMA_DEFAULTS
        | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": None}
        | {"logits_scaling": 1.0, "use_post_norm": True},
    ),
    "Olmo2ForCausalLM": Family(
        _LLAMA_KEYS | _ATTENTION_BIAS,
        Storage(POST_NORM_NAMES),
        _LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5},
        features=_POST_NORMS | {"qk_norm_over": "projection"},
    ),
    "Olmo3ForCausalLM": Family(
        _LLAMA_KEYS | _ATTENTION_BIAS,
        Storage(POST_NORM_NAMES),
        _LLAMA_DEFAULTS
        | {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_local_base_freq": 500000.0}
        | {"sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 4},
        features=_POST_NORMS | {"qk_norm_over": "projection"},
        local=all_but_every_nth,
    ),
    "Exaone4ForCausalLM": Family(
        _LLAMA_KEYS,
        Storage(POST_NORM_NAMES),
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 32, "rms_norm_eps": 1e-5}
        | {"sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 4},
        features=_POST_NORMS,
        local=all_but_every_nth,
        rotates=_unless_whole,
    ),
    "GlmForCausalLM": Family(_GLM_KEYS, Storage(GATE_UP_NAMES, interleaved=True), _GLM_DEFAULTS),
    "Glm4ForCausalLM": Family(
        _GLM_KEYS, Storage(GLM4_NAMES, interleaved=True), _GLM_DEFAULTS, features={"post_norms": True}
    ),
    "Ernie4_5ForCausalLM": Family(
        _LLAMA_KEYS | {"qkv_bias": "use_bias", "out_bias": "use_bias", "ffn_bias": "use_bias"},
        _INTERLEAVED,
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5}
        | {"tie_word_embeddings": True, "rope_theta": 500000.0, "use_bias": False},
    ),
    "HeliumForCausalLM": Family(
        _LLAMA_KEYS | {"qkv_bias": "attention_bias", "ffn_bias": "mlp_bias"},
        _INTERLEAVED,
        _LLAMA_DEFAULTS | {"num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8, "rope_theta": 100000.0},
    ),
    "SeedOssForCausalLM": Family(
        _LLAMA_KEYS | {"qkv_bias": "attention_bias", "out_bias": "attention_out_bias", "ffn_bias": "mlp_bias"},
        _LLAMA,
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "attention_out_bias": False},
    ),
    "ArceeForCausalLM": Family(
        _LLAMA_KEYS | _BIASES,
        Storage(UNGATED_NAMES),
        _LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
        features={"gated": False},
    ),
    "ApertusForCausalLM": Family(
        _LLAMA_KEYS | _ATTENTION_BIAS,
        Storage(
            APERTUS_NAMES,
            converted={"positive": F.softplus, "negative": lambda stored: 0.5 + F.softplus(stored)},
        ),
        _LLAMA_DEFAULTS
        | {"rms_norm_eps": 1e-5, "hidden_act": "xielu", "rope_theta": 12e6, "rope_parameters": _APERTUS_ROPE},
        features={"gated": False, "qk_norm": True},
    ),
    "CwmForCausalLM": Family(
        _LLAMA_KEYS | {"ffn_bias": "mlp_bias"},
        _LLAMA,
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
        | {"sliding_window": 8192, "layer_types": None, "rope_parameters": _CWM_ROPE},
        local=_all_but_first_of_four,
    ),
    "InternLM2ForCausalLM": Family(
        _LLAMA_KEYS | {"qkv_bias": "bias", "out_bias": "bias"},
        Storage(INTERNLM2_NAMES, turns=None),
        _LLAMA_DEFAULTS | {"bias": True},
    ),
    "MiniCPMForCausalLM": Family(
        _LLAMA_KEYS
        | {
            "embedding_scale": "scale_emb",
            "residual_scale": lambda settings: settings["scale_depth"] / math.sqrt(settings["num_hidden_layers"]),
            "logit_scale": lambda settings: settings["dim_model_base"] / settings["hidden_size"],
        },
        _LLAMA,
        _LLAMA_DEFAULTS | {"tie_word_embeddings": True, "scale_emb": 1, "dim_model_base": 1, "scale_depth": 1},
        only={"rope_scaling": (None,), "num_experts": (0,)},
    ),
} | GPT_FAMILIES
"""Maps the architecture in config.json to its family. Code Llama, TinyLlama, SmolLM 2 and XGen are LlamaForCausalLM."""
