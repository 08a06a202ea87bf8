"""ModelConfig, which holds and validates every dimension and feature of a model."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies for contexts longer than the original one. `model.rotary` has the formulas.

    Attributes:
        kind: llama3, linear, dynamic, yarn or longrope, as in Hugging Face's `rope_type`.
        factor: factor by which the context is extended.
        original_context: number of positions for which the frequencies were first trained. Dynamic and longrope scaling
            leave these positions unchanged; llama3 and yarn count turns within them; linear scaling does not use it.
        low_freq_factor, high_freq_factor: limits between the kept and the stretched wavelengths of llama3 scaling.
        beta_fast, beta_slow: limits of yarn scaling, in turns within the original context.
        truncate: whether the pair indices at yarn's limits are rounded outwards.
        attention_factor: factor of cos and sin in yarn and longrope scaling; None if it is computed from the other
            fields.
        short_factors, long_factors: longrope's divisor of each pair's frequency, for texts up to the original context
            and for longer ones.
    """

    kind: str = "llama3"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    KINDS = ("llama3", "linear", "dynamic", "yarn", "longrope")

    def __post_init__(self) -> None:
        numbers = (self.factor, self.low_freq_factor, self.high_freq_factor, self.beta_fast, self.beta_slow)
        if self.kind not in self.KINDS:
            raise ValueError(f"rope scaling {self.kind!r} is unknown; supported are {', '.join(self.KINDS)}")
        in_order = self.low_freq_factor < self.high_freq_factor and self.beta_slow < self.beta_fast
        positive = all(0 < number < math.inf for number in numbers) and self.factor >= 1 and self.original_context >= 2
        if not in_order or not positive:
            raise ValueError(
                f"rope scaling {dataclasses.asdict(self)} is invalid: it needs factor >= 1, original_context >= 2, "
                "0 < low_freq_factor < high_freq_factor and 0 < beta_slow < beta_fast"
            )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(f"attention_factor is {self.attention_factor}: it must be a positive number")
        for factors in (self.short_factors, self.long_factors):
            if (self.kind == "longrope") != bool(factors) or not all(0 < factor < math.inf for factor in factors):
                raise ValueError(
                    f"rope scaling {self.kind} has the divisors {factors}: longrope needs them, other kinds have none"
                )


_LARGEST = {
    "dim": 1 << 17,
    "n_layers": 1 << 10,
    "n_heads": 1 << 12,
    "n_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "hidden_dim": 1 << 20,
    "vocab_size": 1 << 22,
    "context": 1 << 26,
}
"""Upper limits of the dimensions, far above those of any model. A larger number means a damaged file, and is reported
here rather than by running out of memory.
"""

_CHOICES = {
    "norm": ("rms", "layer"),
    "qk_norm_over": ("head", "own_head", "projection"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu", "relu_squared", "xielu"),
    "positions": ("rope", "learned", "alibi"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and features of one checkpoint. The default values of the features are those of Llama.

    Attributes:
        dim: width of the residual stream (D).
        n_layers: number of blocks.
        n_heads: number of query heads (H).
        n_kv_heads: number of key and value heads (K); divides n_heads.
        head_dim: width of one head (Dh); not always dim / n_heads.
        hidden_dim: width of the feed-forward network (F).
        vocab_size: number of rows of the embedding (V).
        context: number of positions for which the checkpoint was trained.
        norm_eps: added to the mean square in RMSNorm, to the variance in LayerNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: scaling of the rotary frequencies, or None.
        local_rope_theta: base of the rotary frequencies of local blocks, which are then not scaled (Gemma 3); None if
            they have the same frequencies as the others.
        tied: whether embedding and output head share one matrix.

        norm: rms (RMSNorm) or layer (LayerNorm).
        norm_bias: whether norms add a bias.
        embedding_norm: whether the embeddings are normalised (BLOOM).
        qk_norm: whether queries and keys are normalised before rotation (Qwen 3).
        qk_norm_over: what one norm of queries or keys covers: head (each head, with one weight for all), own_head (each
            head, with a weight of its own; Cohere) or projection (all heads together; OLMo 2).
        pre_norms, post_norms: whether the inputs and the outputs of attention and feed-forward are normalised (Gemma 2
            has both, OLMo 2 only the outputs).
        parallel: whether attention and feed-forward read the same input (GPT-J).
        parallel_norms: whether a parallel block normalises the feed-forward's input separately (GPT-NeoX).
        activation: silu, gelu, gelu_tanh, relu, relu_squared or xielu.
        gated: whether the feed-forward is gated: w2(act(w1 x) * w3 x) instead of w2(act(w1 x)).
        n_experts, n_chosen_experts: number of experts per block, and number of them used for each token; 0 for a single
            feed-forward.
        qkv_bias, out_bias, ffn_bias, head_bias: whether the linear layers for queries, keys and values, for the
            attention output, in the feed-forward and in the head add a bias.
        positions: rope, learned (an embedding of position ids) or alibi (a bias in the mask).
        rotary_dim: number of leading values of each head that are rotated, even; None for all of them.
        nope_layers: blocks without rotary embedding (SmolLM 3).
        alibi_max_bias: sets the range of ALiBi's slopes, from 2^(-max_bias/H) to 2^-max_bias.
        sliding_window: number of positions that a local block attends to, including the current one; None if there are
            no local blocks.
        local_layers: blocks that attend only to the sliding window.
        embedding_scale, residual_scale, logit_scale: factors of the embeddings, of each block's attention and
            feed-forward terms, and of the logits (Gemma, Granite).
        attention_scale: factor of the attention scores; None for head_dim^-0.5.
        attention_softcap, logit_softcap: c in c * tanh(x / c), applied to scores and logits (Gemma 2); None for no cap.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    tied: bool = False

    norm: str = "rms"
    norm_bias: bool = False
    embedding_norm: bool = False
    qk_norm: bool = False
    qk_norm_over: str = "head"
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    parallel_norms: bool = False
    activation: str = "silu"
    gated: bool = True
    n_experts: int = 0
    n_chosen_experts: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    head_bias: bool = False
    positions: str = "rope"
    rotary_dim: int | None = None
    nope_layers: tuple[int, ...] = ()
    alibi_max_bias: float = 8.0
    sliding_window: int | None = None
    local_layers: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        for name, most in _LARGEST.items():
            self._check_whole(name, 1, most)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(choices)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}: it must be true or false")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        self._check_numbers()
        self._check_positions()
        self._check_whole("n_experts", 0, 1 << 10)
        self._check_whole("n_chosen_experts", min(self.n_experts, 1), self.n_experts)

    def _check_whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}: it must be a whole number from {least} to {most}")

    def _check_numbers(self) -> None:
        if not 0 < self.norm_eps < math.inf or not 0 < self.rope_theta < math.inf:
            raise ValueError(f"norm_eps {self.norm_eps} and rope_theta {self.rope_theta} must be positive numbers")
        scales = ("embedding_scale", "residual_scale", "logit_scale", "attention_scale", "alibi_max_bias")
        for name in (*scales, "attention_softcap", "logit_softcap", "local_rope_theta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: it must be a positive number")

    def _check_positions(self) -> None:
        if self.rotary_dim is not None:
            self._check_whole("rotary_dim", 2, self.head_dim)
        if self.positions == "rope" and self.rotated % 2:
            raise ValueError(f"{self.rotated} of each head's values are rotated: rotary embedding needs pairs")
        for name in ("nope_layers", "local_layers"):
            if not set(getattr(self, name)) <= set(range(self.n_layers)):
                raise ValueError(f"{name} is {getattr(self, name)}: layers run from 0 to {self.n_layers - 1}")
        if self.sliding_window is not None:
            self._check_whole("sliding_window", 1, _LARGEST["context"])
        elif self.local_layers:
            raise ValueError(f"local_layers is {self.local_layers}, but there is no sliding_window")
        if self.local_rope_theta is not None and not self.local_layers:
            raise ValueError(f"local_rope_theta is {self.local_rope_theta}, but there are no local_layers")
        if self.rope_scaling:
            self._check_scaling(self.rope_scaling)

    def _check_scaling(self, scaling: RopeScaling) -> None:
        pairs = self.rotated // 2
        if scaling.kind == "longrope":
            lengths = {len(scaling.short_factors), len(scaling.long_factors)}
            if lengths != {pairs}:
                raise ValueError(f"longrope has {sorted(lengths)} divisors, but {pairs} pairs are rotated")
        if scaling.kind == "dynamic" and pairs < 2:
            raise ValueError("dynamic rope scaling needs two rotated pairs or more")
        if scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}: yarn needs more than 1")

    @property
    def rotated(self) -> int:
        """Number of values of each head that are rotated."""
        return self.rotary_dim or self.head_dim

    def first_pair(self, layer: int) -> int | None:
        """Returns the column of `preproc.rope.tables` where a block's rotary pairs begin; None for a block without
        rotary embedding.
        """
        if self.positions != "rope" or layer in self.nope_layers:
            return None
        return self.rotated // 2 if self.local_rope_theta and self.is_local(layer) else 0

    def is_local(self, layer: int) -> bool:
        """Returns whether a block attends only to the sliding window."""
        return layer in self.local_layers

    def window(self, layer: int) -> int | None:
        """Returns the number of positions that a block attends to, including the current one; None for all."""
        return self.sliding_window if self.is_local(layer) else None

    def slots(self, layer: int, positions: int) -> int:
        """Returns the number of slots in a block's KV cache for a text of `positions` tokens. The cache of a local
        block is a ring of the window's size.
        """
        return min(positions, self.window(layer) or positions)

    def for_length(self, max_seq_len: int) -> "ModelConfig":
        """Returns the config for texts of `max_seq_len` tokens. Beyond the trained context, scaling by a factor is
        stretched in proportion; the other kinds of scaling depend on the length themselves.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind not in ("llama3", "linear", "yarn") or max_seq_len <= self.context:
            return self
        stretched = dataclasses.replace(scaling, factor=scaling.factor * max_seq_len / self.context)
        return dataclasses.replace(self, rope_scaling=stretched)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "ModelConfig":
        """Rebuilds a config from the JSON form of its `dataclasses.asdict`.

        Raises:
            TypeError, ValueError: the fields are not those of a valid config.
        """
        scaling = fields["rope_scaling"]
        return ModelConfig(**_tuples(fields) | {"rope_scaling": RopeScaling(**_tuples(scaling)) if scaling else None})


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
