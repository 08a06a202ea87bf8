"""The model families that descend from GPT: LayerNorm, biases and a feed-forward without a gate. See `families`."""

from export.checkpoints.checkpoint import Storage
from export.checkpoints.family import (
    ACTIVATIONS,
    Family,
    Key,
    Settings,
    all_but_every_nth,
    every_layer,
    rotates_if_local,
)
from export.checkpoints.weight_names import (
    BLOOM_NAMES,
    CODEGEN_NAMES,
    FALCON_NAMES,
    GPT2_NAMES,
    GPT_NEO_NAMES,
    GPT_NEOX_NAMES,
    GPTJ_NAMES,
    HUGGING_FACE_NAMES,
    LAYER_NORM_NAMES,
    MPT_NAMES,
    OPT_NAMES,
    PHI_NAMES,
    STARCODER2_NAMES,
    UNGATED_NAMES,
)


def _listed_as_local(settings: Settings, layer: int) -> bool:
    """Returns whether a block of GPT-Neo is local: it lists kinds of attention with the number of their repetitions."""
    kinds = [kind for kinds, count in settings["attention_types"] for _ in range(count) for kind in kinds]
    return kinds[layer] == "local"


def _falcon_kv_heads(settings: Settings) -> int | None:
    if settings["new_decoder_architecture"]:
        return settings["num_kv_heads"]
    return 1 if settings["multi_query"] else None


def _falcon_norms(settings: Settings) -> bool:
    """Returns whether attention and feed-forward of a parallel block have norms of their own."""
    return bool(settings["new_decoder_architecture"]) and settings["num_ln_in_parallel_attn"] in (None, 2)


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

_BIASED = {"qkv_bias": True, "out_bias": True, "ffn_bias": True}
_KEYS: dict[str, Key] = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
    "tied": "tie_word_embeddings",
    "activation": ("hidden_act", ACTIVATIONS.get),
}
_DEFAULTS = {
    "num_key_value_heads": None,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
_COHERE_KEYS: dict[str, Key] = _KEYS | {
    "qkv_bias": "attention_bias",
    "out_bias": "attention_bias",
    "logit_scale": "logit_scale",
}
_COHERE_DEFAULTS = _DEFAULTS | {"tie_word_embeddings": True, "attention_bias": False, "logit_scale": 0.0625}
_OLD_KEYS = {"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
_COHERE = {"norm": "layer", "parallel": True}
_GPTJ_DEFAULTS = _GPT_DEFAULTS | {"tie_word_embeddings": False, "rotary_dim": 64, "rope_theta": 10000.0}

GPT_FAMILIES = {
    "GPT2LMHeadModel": Family(
        _GPT_KEYS | {"attention_scale": ("scale_attn_weights", lambda scales: None if scales else 1.0)},
        Storage(GPT2_NAMES, transposed=True),
        _GPT_DEFAULTS | {"tie_word_embeddings": True, "scale_attn_weights": True},
        features=_LAYER_NORM | {"qkv_bias": True, "out_bias": True, "ffn_bias": True, "positions": "learned"},
        only={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
        prefix="transformer.",
    ),
    "GPTJForCausalLM": Family(
        _GPT_KEYS | {"rotary_dim": "rotary_dim"},
        Storage(GPTJ_NAMES, interleaved=True),
        _GPTJ_DEFAULTS,
        features=_PARALLEL,
        prefix="transformer.",
    ),
    "CodeGenForCausalLM": Family(
        _GPT_KEYS | {"rotary_dim": "rotary_dim"},
        Storage(CODEGEN_NAMES, turns=4, interleaved=True),
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
        Storage(MPT_NAMES),
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
    "GPTBigCodeForCausalLM": Family(
        _GPT_KEYS
        | {
            "n_kv_heads": ("multi_query", lambda shared: 1 if shared else None),
            "attention_scale": ("scale_attn_weights", lambda scales: None if scales else 1.0),
        },
        Storage(GPT2_NAMES, turns=None),
        _GPT_DEFAULTS
        | {"activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": True}
        | {"scale_attn_weights": True, "multi_query": True},
        features=_LAYER_NORM | _BIASED | {"positions": "learned"},
        only={"add_cross_attention": (False,)},
        prefix="transformer.",
    ),
    "GPTNeoForCausalLM": Family(
        _KEYS | {"norm_eps": "layer_norm_epsilon", "activation": ("activation_function", ACTIVATIONS.get)},
        Storage(GPT_NEO_NAMES),
        _DEFAULTS
        | {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True}
        | {"intermediate_size": None, "sliding_window": 256, "attention_types": [[["global", "local"], 12]]},
        features=_LAYER_NORM | {"out_bias": True, "ffn_bias": True, "attention_scale": 1.0, "positions": "learned"},
        local=_listed_as_local,
        other_keys={
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "window_size": "sliding_window",
        },
        prefix="transformer.",
    ),
    "OPTForCausalLM": Family(
        _KEYS
        | {"norm_eps": "layer_norm_eps", "hidden_dim": "ffn_dim"}
        | {"activation": ("activation_function", ACTIVATIONS.get)}
        | {"qkv_bias": "enable_bias", "out_bias": "enable_bias", "ffn_bias": "enable_bias"},
        Storage(OPT_NAMES, skipped_positions=2),
        _DEFAULTS | {"ffn_dim": 3072, "activation_function": "relu", "tie_word_embeddings": True, "enable_bias": True},
        features=_LAYER_NORM | {"positions": "learned"},
        only={
            "do_layer_norm_before": (True,),
            "_remove_final_layer_norm": (False,),
            "layer_norm_elementwise_affine": (True,),
        },
    ),
    "GPTNeoXForCausalLM": Family(
        _KEYS
        | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
        | {"parallel": "use_parallel_residual", "parallel_norms": "use_parallel_residual"},
        Storage(GPT_NEOX_NAMES, turns=None),
        _DEFAULTS
        | {"hidden_act": "gelu", "partial_rotary_factor": 0.25}
        | {"attention_bias": True, "use_parallel_residual": True},
        features=_LAYER_NORM | {"ffn_bias": True},
        other_keys={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
        prefix="gpt_neox.",
    ),
    "FalconForCausalLM": Family(
        _KEYS
        | {"norm_eps": "layer_norm_epsilon", "hidden_dim": "ffn_hidden_size", "n_kv_heads": _falcon_kv_heads}
        | {"activation": ("activation", ACTIVATIONS.get)}
        | {"qkv_bias": "bias", "out_bias": "bias", "ffn_bias": "bias"}
        | {"parallel": "parallel_attn", "parallel_norms": _falcon_norms},
        Storage(FALCON_NAMES, turns=None),
        _DEFAULTS
        | {"layer_norm_epsilon": 1e-5, "activation": "gelu", "tie_word_embeddings": True, "ffn_hidden_size": None}
        | {"max_position_embeddings": 2048, "bias": False, "parallel_attn": True, "multi_query": True}
        | {"new_decoder_architecture": False, "num_ln_in_parallel_attn": None, "num_kv_heads": None},
        features=_LAYER_NORM,
        only={"alibi": (False,)},
        other_keys=_OLD_KEYS | {"n_head_kv": "num_kv_heads"},
        other_parts={"ln_attn": "input_layernorm", "ln_mlp": "post_attention_layernorm"},
        prefix="transformer.",
    ),
    "BloomForCausalLM": Family(
        {
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "vocab_size": "vocab_size",
            "context": "seq_length",
            "norm_eps": "layer_norm_epsilon",
            "tied": "tie_word_embeddings",
        },
        Storage(BLOOM_NAMES, turns=None),
        {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "seq_length": 2048},
        features=_LAYER_NORM | _BIASED | {"positions": "alibi", "activation": "gelu_tanh", "embedding_norm": True},
        only={"apply_residual_connection_post_layernorm": (False,)},
        other_keys=_OLD_KEYS,
        prefix="transformer.",
    ),
    "PhiForCausalLM": Family(
        _KEYS,
        Storage(PHI_NAMES),
        _DEFAULTS | {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
        features=_PARALLEL | _BIASED,
        only={"qk_layernorm": (False,)},
    ),
    "StableLmForCausalLM": Family(
        _KEYS | {"qkv_bias": "use_qkv_bias", "parallel": "use_parallel_residual"},
        Storage(LAYER_NORM_NAMES),
        _DEFAULTS
        | {"num_key_value_heads": 32, "partial_rotary_factor": 0.25}
        | {"use_qkv_bias": False, "use_parallel_residual": False},
        features={"norm": "layer", "norm_bias": True},
        only={"qk_layernorm": (False,)},
    ),
    "Starcoder2ForCausalLM": Family(
        _KEYS | {"norm_eps": "norm_epsilon", "qkv_bias": "use_bias", "out_bias": "use_bias", "ffn_bias": "use_bias"},
        Storage(STARCODER2_NAMES),
        _DEFAULTS
        | {"num_key_value_heads": 2, "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh"}
        | {"tie_word_embeddings": True, "use_bias": True, "sliding_window": None},
        features=_LAYER_NORM,
        local=every_layer,
    ),
    "NemotronForCausalLM": Family(
        _KEYS
        | {"head_dim": "head_dim", "norm_eps": "norm_eps"}
        | {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "ffn_bias": "mlp_bias"},
        Storage(UNGATED_NAMES, norm_offset=1.0),
        _DEFAULTS
        | {"head_dim": None, "norm_eps": 1e-5, "hidden_act": "relu2", "partial_rotary_factor": 0.5}
        | {"attention_bias": False, "mlp_bias": False},
        features=_LAYER_NORM,
    ),
    "Jais2ForCausalLM": Family(
        _KEYS
        | {"head_dim": "head_dim"}
        | {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "ffn_bias": "mlp_bias"},
        Storage(UNGATED_NAMES),
        _DEFAULTS | {"head_dim": None, "hidden_act": "relu2", "attention_bias": True, "mlp_bias": True},
        features=_LAYER_NORM,
    ),
    "CohereForCausalLM": Family(
        _COHERE_KEYS | {"qk_norm": "use_qk_norm"},
        Storage(HUGGING_FACE_NAMES, interleaved=True),
        _COHERE_DEFAULTS | {"rope_theta": 500000.0, "use_qk_norm": False},
        features=_COHERE | {"qk_norm_over": "own_head"},
    ),
    "Cohere2ForCausalLM": Family(
        _COHERE_KEYS,
        Storage(HUGGING_FACE_NAMES, interleaved=True),
        _COHERE_DEFAULTS | {"sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 4},
        features=_COHERE,
        local=all_but_every_nth,
        rotates=rotates_if_local,
    ),
}
"""Maps the architecture in config.json to its family."""
