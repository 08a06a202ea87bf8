"""The model families of Hugging Face checkpoints, by the name of the architecture.

A family defines the meaning of its keys in config.json, their default values, the features common to all its models,
and the storage of its weights. Names, defaults and meanings are those of transformers' configuration and modelling
modules.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from export.checkpoints.checkpoint import Storage

Settings = Mapping[str, Any]
"""The content of config.json."""


def _without(settings: Settings, layer: int) -> bool:
    return False


def _every(settings: Settings, layer: int) -> bool:
    return True


def _every_other(settings: Settings, layer: int) -> bool:
    return layer % 2 == 0


def _upper(settings: Settings, layer: int) -> bool:
    return bool(settings["use_sliding_window"]) and layer >= settings["max_window_layers"]


def _unrotated(settings: Settings, layer: int) -> bool:
    return bool(settings["use_sliding_window"]) and not rotates(settings, layer)


def rotates(settings: Settings, layer: int) -> bool:
    """Returns whether a block has rotary embedding. In SmolLM 3, every fourth block has none, unless the config lists
    them.
    """
    if "no_rope_layer_interval" not in settings:
        return True
    listed = settings["no_rope_layers"]
    return bool(listed[layer] if listed is not None else (layer + 1) % settings["no_rope_layer_interval"])


Key = str | tuple[str, Callable[[Any], Any]]
"""A key of config.json, alone or with a function that converts its value to that of the ModelConfig field."""


@dataclass(frozen=True)
class Family:
    """The differences between one model family and the others.

    Attributes:
        keys: maps fields of ModelConfig to keys of config.json.
        storage: storage of the weights: their names and layout.
        defaults: default values of keys that config.json omits.
        features: values of ModelConfig fields that all models of the family share.
        only: the supported values of each key; any other value would change the result, and is refused.
        local: returns whether a block attends only to the sliding window, if `layer_types` does not say.
        sections: keys whose values are objects with further keys.
        rope_kinds: maps the family's names of rope scaling kinds to ours.
        prefix: prefix of the weight names, unless it is missing from all of them.
    """

    keys: Mapping[str, Key]
    storage: Storage
    defaults: Settings
    features: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    local: Callable[[Settings, int], bool] = _without
    sections: tuple[str, ...] = ()
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "model."


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Maps transformers' names of activations to ours. Its three implementations of GELU by tanh differ only in
rounding.
"""


def _both(ours: str, theirs: str) -> dict[str, str]:
    """Returns the table entries for a layer's weight and its optional bias."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


HUGGING_FACE_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    **_both("layers.*.attention.wq", "model.layers.*.self_attn.q_proj"),
    **_both("layers.*.attention.wk", "model.layers.*.self_attn.k_proj"),
    **_both("layers.*.attention.wv", "model.layers.*.self_attn.v_proj"),
    **_both("layers.*.attention.wo", "model.layers.*.self_attn.o_proj"),
    "layers.*.attention.q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.attention.k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    **_both("layers.*.feed_forward.w1", "model.layers.*.mlp.gate_proj"),
    **_both("layers.*.feed_forward.w2", "model.layers.*.mlp.down_proj"),
    **_both("layers.*.feed_forward.w3", "model.layers.*.mlp.up_proj"),
    "head.norm.weight": "model.norm.weight",
    "head.output.weight": "lm_head.weight",
}
"""Maps our weight names to those of Hugging Face's Llama, which most families use."""

_MIXTRAL_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.feed_forward.router.weight": "model.layers.*.block_sparse_moe.gate.weight",
    "layers.*.feed_forward.experts.*.w1.weight": "model.layers.*.block_sparse_moe.experts.*.w1.weight",
    "layers.*.feed_forward.experts.*.w2.weight": "model.layers.*.block_sparse_moe.experts.*.w2.weight",
    "layers.*.feed_forward.experts.*.w3.weight": "model.layers.*.block_sparse_moe.experts.*.w3.weight",
}

_PHI3_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.qkv_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.qkv_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.qkv_proj.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_up_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.gate_up_proj.weight",
}

_GEMMA2_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.attention_post_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.pre_feedforward_layernorm.weight",
    "layers.*.ffn_post_norm.weight": "model.layers.*.post_feedforward_layernorm.weight",
}

_GPT2_NAMES = {
    "tok_embeddings.weight": "transformer.wte.weight",
    "pos_embeddings.weight": "transformer.wpe.weight",
    **_both("layers.*.attention_norm", "transformer.h.*.ln_1"),
    **_both("layers.*.attention.wq", "transformer.h.*.attn.c_attn"),
    **_both("layers.*.attention.wk", "transformer.h.*.attn.c_attn"),
    **_both("layers.*.attention.wv", "transformer.h.*.attn.c_attn"),
    **_both("layers.*.attention.wo", "transformer.h.*.attn.c_proj"),
    **_both("layers.*.ffn_norm", "transformer.h.*.ln_2"),
    **_both("layers.*.feed_forward.w1", "transformer.h.*.mlp.c_fc"),
    **_both("layers.*.feed_forward.w2", "transformer.h.*.mlp.c_proj"),
    **_both("head.norm", "transformer.ln_f"),
    "head.output.weight": "lm_head.weight",
}

_GPTJ_NAMES = {
    "tok_embeddings.weight": "transformer.wte.weight",
    **_both("layers.*.attention_norm", "transformer.h.*.ln_1"),
    "layers.*.attention.wq.weight": "transformer.h.*.attn.q_proj.weight",
    "layers.*.attention.wk.weight": "transformer.h.*.attn.k_proj.weight",
    "layers.*.attention.wv.weight": "transformer.h.*.attn.v_proj.weight",
    "layers.*.attention.wo.weight": "transformer.h.*.attn.out_proj.weight",
    **_both("layers.*.feed_forward.w1", "transformer.h.*.mlp.fc_in"),
    **_both("layers.*.feed_forward.w2", "transformer.h.*.mlp.fc_out"),
    **_both("head.norm", "transformer.ln_f"),
    **_both("head.output", "lm_head"),
}

_CODEGEN_QKV = "transformer.h.*.attn.qkv_proj.weight"
_CODEGEN_NAMES = {name: theirs for name, theirs in _GPTJ_NAMES.items() if ".attention.w" not in name} | {
    "layers.*.attention.wq.weight": _CODEGEN_QKV,
    "layers.*.attention.wv.weight": _CODEGEN_QKV,
    "layers.*.attention.wk.weight": _CODEGEN_QKV,
    "layers.*.attention.wo.weight": "transformer.h.*.attn.out_proj.weight",
}

_MPT_NAMES = {
    "tok_embeddings.weight": "transformer.wte.weight",
    "layers.*.attention_norm.weight": "transformer.blocks.*.norm_1.weight",
    "layers.*.attention.wq.weight": "transformer.blocks.*.attn.Wqkv.weight",
    "layers.*.attention.wk.weight": "transformer.blocks.*.attn.Wqkv.weight",
    "layers.*.attention.wv.weight": "transformer.blocks.*.attn.Wqkv.weight",
    "layers.*.attention.wo.weight": "transformer.blocks.*.attn.out_proj.weight",
    "layers.*.ffn_norm.weight": "transformer.blocks.*.norm_2.weight",
    "layers.*.feed_forward.w1.weight": "transformer.blocks.*.ffn.up_proj.weight",
    "layers.*.feed_forward.w2.weight": "transformer.blocks.*.ffn.down_proj.weight",
    "head.norm.weight": "transformer.norm_f.weight",
    "head.output.weight": "lm_head.weight",
}

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
_CAUSAL = {"use_bidirectional_attention": (None, False)}

_GPT_KEYS: dict[str, Key] = {
    "dim": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "hidden_dim": "n_inner",
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
    "activation": ("activation_function", ACTIVATIONS.get),
}
_GPT_DEFAULTS = {"n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
_LAYER_NORM = {"norm": "layer", "norm_bias": True, "gated": False}
_PARALLEL = _LAYER_NORM | {"parallel": True, "ffn_bias": True, "head_bias": True}

_LLAMA = Storage(HUGGING_FACE_NAMES)
_GPTJ_DEFAULTS = _GPT_DEFAULTS | {"tie_word_embeddings": False, "rotary_dim": 64, "rope_theta": 10000.0}

FAMILIES = {
    "LlamaForCausalLM": Family(_LLAMA_KEYS | _BIASES, _LLAMA, _LLAMA_DEFAULTS),
    "MistralForCausalLM": Family(
        _LLAMA_KEYS, _LLAMA, _LLAMA_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096}, local=_every
    ),
    "MixtralForCausalLM": Family(
        _LLAMA_KEYS | {"n_experts": "num_local_experts", "n_chosen_experts": "num_experts_per_tok"},
        Storage(_MIXTRAL_NAMES),
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
        | {"num_local_experts": 8, "num_experts_per_tok": 2},
        local=_every,
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
        Storage(_PHI3_NAMES),
        _LLAMA_DEFAULTS
        | {"rms_norm_eps": 1e-5, "sliding_window": None}
        | {"original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
        local=_every,
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
        _LLAMA_KEYS
        | _ATTENTION_BIAS
        | _GEMMA_SCALE
        | {
            "activation": ("hidden_activation", ACTIVATIONS.get),
            "attention_scale": ("query_pre_attn_scalar", lambda scalar: scalar**-0.5),
            "attention_softcap": "attn_logit_softcapping",
            "logit_softcap": "final_logit_softcapping",
        },
        Storage(_GEMMA2_NAMES, norm_offset=1.0),
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096}
        | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "layer_types": None}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        features={"post_norms": True},
        only=_CAUSAL,
        local=_every_other,
    ),
    "SmolLM3ForCausalLM": Family(
        _LLAMA_KEYS | _BIASES,
        _LLAMA,
        _LLAMA_DEFAULTS
        | {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6, "layer_types": None}
        | {"use_sliding_window": False, "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
        local=_unrotated,
    ),
    "GraniteForCausalLM": Family(
        _LLAMA_KEYS
        | _BIASES
        | {
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention_scale": "attention_multiplier",
            "logit_scale": ("logits_scaling", lambda divisor: 1 / divisor),
        },
        _LLAMA,
        _LLAMA_DEFAULTS
        | {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0},
    ),
    "GPT2LMHeadModel": Family(
        _GPT_KEYS | {"attention_scale": ("scale_attn_weights", lambda scales: None if scales else 1.0)},
        Storage(_GPT2_NAMES, transposed=True),
        _GPT_DEFAULTS | {"tie_word_embeddings": True, "scale_attn_weights": True},
        features=_LAYER_NORM | {"qkv_bias": True, "out_bias": True, "ffn_bias": True, "positions": "learned"},
        only={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
        prefix="transformer.",
    ),
    "GPTJForCausalLM": Family(
        _GPT_KEYS | {"rotary_dim": "rotary_dim"},
        Storage(_GPTJ_NAMES, interleaved=True),
        _GPTJ_DEFAULTS,
        features=_PARALLEL,
        prefix="transformer.",
    ),
    "CodeGenForCausalLM": Family(
        _GPT_KEYS | {"rotary_dim": "rotary_dim"},
        Storage(_CODEGEN_NAMES, turns=4, interleaved=True),
        _GPTJ_DEFAULTS,
        features=_PARALLEL,
        prefix="transformer.",
    ),
    "MptForCausalLM": Family(
        {
            "dim": "d_model",
            "n_layers": "n_layers",
            "n_heads": "n_heads",
            "vocab_size": "vocab_size",
            "context": "max_seq_len",
            "norm_eps": "layer_norm_epsilon",
            "tied": "tie_word_embeddings",
            "attention_scale": "softmax_scale",
            "alibi_max_bias": "alibi_bias_max",
        },
        Storage(_MPT_NAMES),
        {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "softmax_scale": None, "alibi_bias_max": 8},
        features={"norm": "layer", "gated": False, "activation": "gelu", "positions": "alibi"},
        only={
            "expansion_ratio": (4,),
            "no_bias": (True,),
            "norm_type": ("low_precision_layernorm", "layernorm"),
            "logit_scale": (None,),
            "attn_type": ("multihead_attention",),
            "clip_qkv": (None,),
            "qk_ln": (False,),
            "prefix_lm": (False,),
            "attn_uses_sequence_id": (False,),
            "alibi": (True,),
        },
        sections=("attn_config",),
        prefix="transformer.",
    ),
}
"""Maps the architecture in config.json to its family. Code Llama, TinyLlama, SmolLM 2 and XGen are LlamaForCausalLM."""
