"""The architectures of GGUF files: the family of `families` that each of them is, and what differs in GGUF.

GGUF's names are the same for all architectures, see `GGUF_NAMES`. The values of fields that files omit, and what is
fixed for an architecture because no field says it, are those of llama.cpp (ggml-org/llama.cpp, src/models).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from export.checkpoints.checkpoint import Storage
from export.checkpoints.family import Key, Settings, always_rotates, rotates_if_local
from export.checkpoints.weight_names import GGUF_FUSED_QKV, GGUF_GATE_UP_NAMES, GGUF_NAMES, both

WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
BASE, LOCAL_BASE = "rope.freq_base", "rope.freq_base_swa"


@dataclass(frozen=True)
class Architecture:
    """The differences between one GGUF architecture and the others. Settings are a file's fields, without the name of
    the architecture, and its tensors' shapes.

    Attributes:
        family: the key of the same models in `families.FAMILIES`, whose features they have.
        names: maps our weight names to GGUF's.
        interleaved: whether rotary pairs are rows (2i, 2i + 1).
        features: values of further ModelConfig fields that all models of the architecture share.
        keys: maps fields of ModelConfig to settings, in addition to `KEYS`.
        defaults: values of fields that files omit. A sliding window applies to all blocks but the last of each n, where
            n is the field `PATTERN`.
        only: the supported values of each field; any other value would change the result, and is refused.
        rotates: returns whether a block has rotary embedding, from the settings, its number, and whether it is local.
    """

    family: str
    names: Mapping[str, str] = field(default_factory=lambda: GGUF_NAMES)
    interleaved: bool = False
    features: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)
    defaults: Settings = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rotates: Callable[[Settings, int, bool], bool] = always_rotates

    def storage(self, tensors: Collection[str]) -> Storage:
        """Returns how a file with these tensors stores its weights. Some have queries, keys and values in one tensor,
        and Falcon's large models have two norms, of which the second is that of attention.
        """
        fused = GGUF_FUSED_QKV if "blk.0.attn_qkv.weight" in tensors else {}
        two_norms = _TWO_NORMS if _SECOND_NORM in tensors else {}
        return Storage({**self.names, **fused, **two_norms}, interleaved=self.interleaved)


_SECOND_NORM = "blk.0.attn_norm_2.weight"
_TWO_NORMS = both("layers.*.attention_norm", "blk.*.attn_norm_2") | both("layers.*.ffn_norm", "blk.*.attn_norm")


def has(*tensors: str) -> Key:
    """Returns the key of a feature that a file has if it has one of the tensors."""
    return lambda settings: any(tensor in settings for tensor in tensors)


def lacks(tensor: str) -> Key:
    """Returns the key of a feature that a file has if it lacks the tensor."""
    return lambda settings: tensor not in settings


KEYS: dict[str, Key] = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_dim": "feed_forward_length",
    "context": "context_length",
    "local_rope_theta": LOCAL_BASE,
    "n_experts": "expert_count",
    "n_chosen_experts": "expert_used_count",
    "vocab_size": ("token_embd.weight", lambda shape: shape[0]),
    "tied": lacks("output.weight"),
    "qkv_bias": has("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"),
    "out_bias": has("blk.0.attn_output.bias"),
    "ffn_bias": has("blk.0.ffn_down.bias"),
    "head_bias": has("output.bias"),
}
"""Maps fields of ModelConfig to the settings of all architectures."""

DEFAULTS: dict[str, Any] = {
    "attention.head_count_kv": None,
    "attention.key_length": None,
    "expert_count": 0,
    "expert_used_count": 0,
    BASE: 10000.0,
    LOCAL_BASE: None,
    WINDOW: None,
    PATTERN: 1,
}


def _unless_zero(value: float) -> float | None:
    return value or None


def _unless_whole(settings: Settings, layer: int, local: bool) -> bool:
    return local or not settings[WINDOW]


def _three_of_four(settings: Settings, layer: int, local: bool) -> bool:
    return bool((layer + 1) % 4)


def _gemma_scale(layers: int) -> Key:
    """Returns the key of the attention scale of Gemma 2 and 3, which only in the largest model, of so many layers, is
    not that of the heads' width.
    """

    def scale(settings: Settings) -> float | None:
        width = settings["embedding_length"] // settings["attention.head_count"]
        return float(width**-0.5) if settings["block_count"] == layers else None

    return scale


def _unscaled(settings: Settings) -> Any:
    """Returns the base of OLMo 3's local blocks, whose rotary frequencies are not scaled."""
    return settings[LOCAL_BASE] or settings[BASE]


_GELU, _GELU_TANH = {"activation": "gelu"}, {"activation": "gelu_tanh"}
_EMBEDDING_SCALE: dict[str, Key] = {"embedding_scale": ("embedding_length", math.sqrt)}
_GEMMA2_KEYS = _EMBEDDING_SCALE | {
    "attention_scale": _gemma_scale(46),
    "attention_softcap": ("attn_logit_softcapping", _unless_zero),
    "logit_softcap": ("final_logit_softcapping", _unless_zero),
}
_GEMMA2_DEFAULTS = {WINDOW: 4096, PATTERN: 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_MINICPM_KEYS: dict[str, Key] = {
    "embedding_scale": "embedding_scale",
    "residual_scale": "residual_scale",
    "logit_scale": ("logit_scale", lambda divisor: 1 / divisor),
}
_GRANITE_KEYS: dict[str, Key] = _MINICPM_KEYS | {
    "embedding_scale": ("embedding_scale", lambda scale: scale or 1.0),
    "residual_scale": ("residual_scale", lambda scale: scale or 1.0),
    "attention_scale": ("attention.scale", _unless_zero),
}

ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", interleaved=True),
    "mistral3": Architecture(
        "Mistral3ForConditionalGeneration", interleaved=True, only={"attention.temperature_scale": (0.0,)}
    ),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "phi3": Architecture("Phi3ForCausalLM", GGUF_GATE_UP_NAMES, defaults={PATTERN: 0}),
    "gemma": Architecture("GemmaForCausalLM", features=_GELU_TANH, keys=_EMBEDDING_SCALE),
    "gemma2": Architecture("Gemma2ForCausalLM", features=_GELU_TANH, keys=_GEMMA2_KEYS, defaults=_GEMMA2_DEFAULTS),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        features=_GELU_TANH,
        keys=_EMBEDDING_SCALE
        | {"attention_scale": _gemma_scale(62), "logit_softcap": ("final_logit_softcapping", _unless_zero)},
        defaults={PATTERN: 6, LOCAL_BASE: 10000.0, "final_logit_softcapping": 0.0},
    ),
    "smollm3": Architecture("SmolLM3ForCausalLM", interleaved=True, rotates=_three_of_four),
    "granite": Architecture(
        "GraniteForCausalLM",
        interleaved=True,
        keys=_GRANITE_KEYS,
        defaults={"embedding_scale": 0.0, "residual_scale": 0.0, "attention.scale": 0.0},
        only={"rope.scaling.finetuned": (True,)},
    ),
    "minicpm": Architecture("MiniCPMForCausalLM", interleaved=True, keys=_MINICPM_KEYS),
    "olmo2": Architecture("Olmo3ForCausalLM", keys={"local_rope_theta": _unscaled}, defaults={PATTERN: 4}),
    "exaone4": Architecture("Exaone4ForCausalLM", defaults={PATTERN: 4}, rotates=_unless_whole),
    "chatglm": Architecture("GlmForCausalLM", GGUF_GATE_UP_NAMES, interleaved=True),
    "glm4": Architecture("Glm4ForCausalLM", GGUF_GATE_UP_NAMES, interleaved=True),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", interleaved=True),
    "seed_oss": Architecture("SeedOssForCausalLM", GGUF_NAMES | both("layers.*.ffn_norm", "blk.*.post_attention_norm")),
    "arcee": Architecture(
        "ArceeForCausalLM", GGUF_GATE_UP_NAMES, interleaved=True, features={"activation": "relu_squared"}
    ),
    "internlm2": Architecture("InternLM2ForCausalLM", interleaved=True),
    "gpt2": Architecture("GPT2LMHeadModel", GGUF_GATE_UP_NAMES, features=_GELU_TANH),
    "starcoder": Architecture("GPTBigCodeForCausalLM", GGUF_GATE_UP_NAMES, features=_GELU_TANH),
    "gptneox": Architecture(
        "GPTNeoXForCausalLM",
        GGUF_GATE_UP_NAMES,
        features=_GELU,
        keys={"parallel": "use_parallel_residual", "parallel_norms": "use_parallel_residual"},
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        GGUF_GATE_UP_NAMES,
        features=_GELU | {"parallel": True},
        keys={"parallel_norms": has(_SECOND_NORM)},
    ),
    "bloom": Architecture("BloomForCausalLM", GGUF_GATE_UP_NAMES),
    "phi2": Architecture("PhiForCausalLM", GGUF_GATE_UP_NAMES, features=_GELU_TANH),
    "stablelm": Architecture("StableLmForCausalLM", keys={"parallel": lacks("blk.0.ffn_norm.weight")}),
    "starcoder2": Architecture("Starcoder2ForCausalLM", GGUF_GATE_UP_NAMES, features=_GELU_TANH),
    "nemotron": Architecture("NemotronForCausalLM", GGUF_GATE_UP_NAMES, features={"activation": "relu_squared"}),
    "jais2": Architecture("Jais2ForCausalLM", GGUF_GATE_UP_NAMES, features={"activation": "relu_squared"}),
    "command-r": Architecture(
        "CohereForCausalLM",
        interleaved=True,
        keys={"logit_scale": "logit_scale", "qk_norm": has("blk.0.attn_q_norm.weight")},
    ),
    "cohere2": Architecture(
        "Cohere2ForCausalLM",
        interleaved=True,
        keys={"logit_scale": "logit_scale"},
        defaults={PATTERN: 4},
        rotates=rotates_if_local,
    ),
    "mpt": Architecture(
        "MptForCausalLM",
        GGUF_GATE_UP_NAMES,
        keys={"alibi_max_bias": "attention.max_alibi_bias"},
        only={"attention.clamp_kqv": (0.0,)},
    ),
}
"""Maps GGUF's names of architectures to their differences."""
