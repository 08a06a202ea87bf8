"""Names of the weights in Hugging Face checkpoints, of which each table maps our names to those of some families, and
in GGUF.
"""


def both(ours: str, theirs: str) -> dict[str, str]:
    """Returns the table entries for a layer's weight and its optional bias."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


HUGGING_FACE_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    **both("layers.*.attention.wq", "model.layers.*.self_attn.q_proj"),
    **both("layers.*.attention.wk", "model.layers.*.self_attn.k_proj"),
    **both("layers.*.attention.wv", "model.layers.*.self_attn.v_proj"),
    **both("layers.*.attention.wo", "model.layers.*.self_attn.o_proj"),
    "layers.*.attention.q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "layers.*.attention.k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    **both("layers.*.feed_forward.w1", "model.layers.*.mlp.gate_proj"),
    **both("layers.*.feed_forward.w2", "model.layers.*.mlp.down_proj"),
    **both("layers.*.feed_forward.w3", "model.layers.*.mlp.up_proj"),
    "head.norm.weight": "model.norm.weight",
    "head.output.weight": "lm_head.weight",
}
"""Maps our weight names to those of Hugging Face's Llama, which most families use."""

MIXTRAL_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.feed_forward.router.weight": "model.layers.*.block_sparse_moe.gate.weight",
    "layers.*.feed_forward.experts.*.w1.weight": "model.layers.*.block_sparse_moe.experts.*.w1.weight",
    "layers.*.feed_forward.experts.*.w2.weight": "model.layers.*.block_sparse_moe.experts.*.w2.weight",
    "layers.*.feed_forward.experts.*.w3.weight": "model.layers.*.block_sparse_moe.experts.*.w3.weight",
}

PHI3_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.qkv_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.qkv_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.qkv_proj.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_up_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.gate_up_proj.weight",
}

GEMMA2_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.attention_post_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.pre_feedforward_layernorm.weight",
    "layers.*.ffn_post_norm.weight": "model.layers.*.post_feedforward_layernorm.weight",
}

GPT2_NAMES = {
    "tok_embeddings.weight": "transformer.wte.weight",
    "pos_embeddings.weight": "transformer.wpe.weight",
    **both("layers.*.attention_norm", "transformer.h.*.ln_1"),
    **both("layers.*.attention.wq", "transformer.h.*.attn.c_attn"),
    **both("layers.*.attention.wk", "transformer.h.*.attn.c_attn"),
    **both("layers.*.attention.wv", "transformer.h.*.attn.c_attn"),
    **both("layers.*.attention.wo", "transformer.h.*.attn.c_proj"),
    **both("layers.*.ffn_norm", "transformer.h.*.ln_2"),
    **both("layers.*.feed_forward.w1", "transformer.h.*.mlp.c_fc"),
    **both("layers.*.feed_forward.w2", "transformer.h.*.mlp.c_proj"),
    **both("head.norm", "transformer.ln_f"),
    "head.output.weight": "lm_head.weight",
}

GPTJ_NAMES = {
    "tok_embeddings.weight": "transformer.wte.weight",
    **both("layers.*.attention_norm", "transformer.h.*.ln_1"),
    "layers.*.attention.wq.weight": "transformer.h.*.attn.q_proj.weight",
    "layers.*.attention.wk.weight": "transformer.h.*.attn.k_proj.weight",
    "layers.*.attention.wv.weight": "transformer.h.*.attn.v_proj.weight",
    "layers.*.attention.wo.weight": "transformer.h.*.attn.out_proj.weight",
    **both("layers.*.feed_forward.w1", "transformer.h.*.mlp.fc_in"),
    **both("layers.*.feed_forward.w2", "transformer.h.*.mlp.fc_out"),
    **both("head.norm", "transformer.ln_f"),
    **both("head.output", "lm_head"),
}

CODEGEN_QKV = "transformer.h.*.attn.qkv_proj.weight"
CODEGEN_NAMES = {name: theirs for name, theirs in GPTJ_NAMES.items() if ".attention.w" not in name} | {
    "layers.*.attention.wq.weight": CODEGEN_QKV,
    "layers.*.attention.wv.weight": CODEGEN_QKV,
    "layers.*.attention.wk.weight": CODEGEN_QKV,
    "layers.*.attention.wo.weight": "transformer.h.*.attn.out_proj.weight",
}

MPT_NAMES = {
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

POST_NORM_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.attention_post_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.ffn_post_norm.weight": "model.layers.*.post_feedforward_layernorm.weight",
}
"""For families that normalise only the outputs of attention and feed-forward."""

HYPERCLOVAX_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.attention_post_norm.weight": "model.layers.*.post_norm1.weight",
    "layers.*.ffn_post_norm.weight": "model.layers.*.post_norm2.weight",
}

GATE_UP_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_up_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.gate_up_proj.weight",
}

GLM4_NAMES = GATE_UP_NAMES | {
    "layers.*.attention_post_norm.weight": "model.layers.*.post_self_attn_layernorm.weight",
    "layers.*.ffn_post_norm.weight": "model.layers.*.post_mlp_layernorm.weight",
}

APERTUS_NAMES = HUGGING_FACE_NAMES | {
    "layers.*.attention_norm.weight": "model.layers.*.attention_layernorm.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.feedforward_layernorm.weight",
    **both("layers.*.feed_forward.w1", "model.layers.*.mlp.up_proj"),
    "layers.*.feed_forward.activation.positive": "model.layers.*.mlp.act_fn.alpha_p",
    "layers.*.feed_forward.activation.negative": "model.layers.*.mlp.act_fn.alpha_n",
}

INTERNLM2_NAMES = {
    "tok_embeddings.weight": "model.tok_embeddings.weight",
    "layers.*.attention_norm.weight": "model.layers.*.attention_norm.weight",
    **both("layers.*.attention.wq", "model.layers.*.attention.wqkv"),
    **both("layers.*.attention.wk", "model.layers.*.attention.wqkv"),
    **both("layers.*.attention.wv", "model.layers.*.attention.wqkv"),
    **both("layers.*.attention.wo", "model.layers.*.attention.wo"),
    "layers.*.ffn_norm.weight": "model.layers.*.ffn_norm.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.feed_forward.w1.weight",
    "layers.*.feed_forward.w2.weight": "model.layers.*.feed_forward.w2.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.feed_forward.w3.weight",
    "head.norm.weight": "model.norm.weight",
    "head.output.weight": "output.weight",
}

LAYER_NORM_NAMES = HUGGING_FACE_NAMES | {
    **both("layers.*.attention_norm", "model.layers.*.input_layernorm"),
    **both("layers.*.ffn_norm", "model.layers.*.post_attention_layernorm"),
    **both("head.norm", "model.norm"),
}

UNGATED_NAMES = LAYER_NORM_NAMES | both("layers.*.feed_forward.w1", "model.layers.*.mlp.up_proj")

STARCODER2_NAMES = LAYER_NORM_NAMES | {
    **both("layers.*.feed_forward.w1", "model.layers.*.mlp.c_fc"),
    **both("layers.*.feed_forward.w2", "model.layers.*.mlp.c_proj"),
}

PHI_NAMES = LAYER_NORM_NAMES | {
    **both("layers.*.attention.wo", "model.layers.*.self_attn.dense"),
    **both("layers.*.feed_forward.w1", "model.layers.*.mlp.fc1"),
    **both("layers.*.feed_forward.w2", "model.layers.*.mlp.fc2"),
    **both("head.norm", "model.final_layernorm"),
    **both("head.output", "lm_head"),
}

GPT_NEOX_NAMES = {
    "tok_embeddings.weight": "gpt_neox.embed_in.weight",
    **both("layers.*.attention_norm", "gpt_neox.layers.*.input_layernorm"),
    **both("layers.*.attention.wq", "gpt_neox.layers.*.attention.query_key_value"),
    **both("layers.*.attention.wk", "gpt_neox.layers.*.attention.query_key_value"),
    **both("layers.*.attention.wv", "gpt_neox.layers.*.attention.query_key_value"),
    **both("layers.*.attention.wo", "gpt_neox.layers.*.attention.dense"),
    **both("layers.*.ffn_norm", "gpt_neox.layers.*.post_attention_layernorm"),
    **both("layers.*.feed_forward.w1", "gpt_neox.layers.*.mlp.dense_h_to_4h"),
    **both("layers.*.feed_forward.w2", "gpt_neox.layers.*.mlp.dense_4h_to_h"),
    **both("head.norm", "gpt_neox.final_layer_norm"),
    "head.output.weight": "embed_out.weight",
}

FALCON_NAMES = {
    "tok_embeddings.weight": "transformer.word_embeddings.weight",
    **both("layers.*.attention_norm", "transformer.h.*.input_layernorm"),
    **both("layers.*.attention.wq", "transformer.h.*.self_attention.query_key_value"),
    **both("layers.*.attention.wk", "transformer.h.*.self_attention.query_key_value"),
    **both("layers.*.attention.wv", "transformer.h.*.self_attention.query_key_value"),
    **both("layers.*.attention.wo", "transformer.h.*.self_attention.dense"),
    **both("layers.*.ffn_norm", "transformer.h.*.post_attention_layernorm"),
    **both("layers.*.feed_forward.w1", "transformer.h.*.mlp.dense_h_to_4h"),
    **both("layers.*.feed_forward.w2", "transformer.h.*.mlp.dense_4h_to_h"),
    **both("head.norm", "transformer.ln_f"),
    "head.output.weight": "lm_head.weight",
}

BLOOM_NAMES = FALCON_NAMES | both("embedding_norm", "transformer.word_embeddings_layernorm")

GPT_NEO_NAMES = GPT2_NAMES | {
    **both("layers.*.attention.wq", "transformer.h.*.attn.attention.q_proj"),
    **both("layers.*.attention.wk", "transformer.h.*.attn.attention.k_proj"),
    **both("layers.*.attention.wv", "transformer.h.*.attn.attention.v_proj"),
    **both("layers.*.attention.wo", "transformer.h.*.attn.attention.out_proj"),
}

OPT_NAMES = {
    "tok_embeddings.weight": "model.decoder.embed_tokens.weight",
    "pos_embeddings.weight": "model.decoder.embed_positions.weight",
    **both("layers.*.attention_norm", "model.decoder.layers.*.self_attn_layer_norm"),
    **both("layers.*.attention.wq", "model.decoder.layers.*.self_attn.q_proj"),
    **both("layers.*.attention.wk", "model.decoder.layers.*.self_attn.k_proj"),
    **both("layers.*.attention.wv", "model.decoder.layers.*.self_attn.v_proj"),
    **both("layers.*.attention.wo", "model.decoder.layers.*.self_attn.out_proj"),
    **both("layers.*.ffn_norm", "model.decoder.layers.*.final_layer_norm"),
    **both("layers.*.feed_forward.w1", "model.decoder.layers.*.fc1"),
    **both("layers.*.feed_forward.w2", "model.decoder.layers.*.fc2"),
    **both("head.norm", "model.decoder.final_layer_norm"),
    "head.output.weight": "lm_head.weight",
}

GGUF_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "pos_embeddings.weight": "position_embd.weight",
    **both("embedding_norm", "token_embd_norm"),
    **both("layers.*.attention_norm", "blk.*.attn_norm"),
    **both("layers.*.attention.wq", "blk.*.attn_q"),
    **both("layers.*.attention.wk", "blk.*.attn_k"),
    **both("layers.*.attention.wv", "blk.*.attn_v"),
    **both("layers.*.attention.wo", "blk.*.attn_output"),
    "layers.*.attention.q_norm.weight": "blk.*.attn_q_norm.weight",
    "layers.*.attention.k_norm.weight": "blk.*.attn_k_norm.weight",
    "layers.*.attention_post_norm.weight": "blk.*.post_attention_norm.weight",
    **both("layers.*.ffn_norm", "blk.*.ffn_norm"),
    **both("layers.*.feed_forward.w1", "blk.*.ffn_gate"),
    **both("layers.*.feed_forward.w2", "blk.*.ffn_down"),
    **both("layers.*.feed_forward.w3", "blk.*.ffn_up"),
    "layers.*.feed_forward.router.weight": "blk.*.ffn_gate_inp.weight",
    "layers.*.feed_forward.experts.*.w1.weight": "blk.*.ffn_gate_exps.weight",
    "layers.*.feed_forward.experts.*.w2.weight": "blk.*.ffn_down_exps.weight",
    "layers.*.feed_forward.experts.*.w3.weight": "blk.*.ffn_up_exps.weight",
    "layers.*.ffn_post_norm.weight": "blk.*.post_ffw_norm.weight",
    **both("head.norm", "output_norm"),
    **both("head.output", "output"),
}
"""Maps our weight names to GGUF's. One tensor has the matrices of all experts."""

GGUF_FUSED_QKV = {
    **both("layers.*.attention.wq", "blk.*.attn_qkv"),
    **both("layers.*.attention.wk", "blk.*.attn_qkv"),
    **both("layers.*.attention.wv", "blk.*.attn_qkv"),
}
GGUF_GATE_UP_NAMES = GGUF_NAMES | both("layers.*.feed_forward.w1", "blk.*.ffn_up")
"""For a gate in the same tensor as the other matrix, or none."""
