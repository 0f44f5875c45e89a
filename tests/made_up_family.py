"""A family that nobody trains, in the one file that a family takes: Qwen3's model under names of its own."""

from __future__ import annotations

from dist_convert.models.blocks import dense_keys
from dist_convert.models.schema import Family, Key, column_parallel, norm, part, row_parallel

HF, MEGATRON = "transformer.h.{layer}", "decoder.layers.{layer}"
ATTENTION, MLP = f"{MEGATRON}.self_attention", f"{MEGATRON}.mlp"

MADE_UP = Family(
    name="made_up",
    hf_class="MadeUpForCausalLM",
    keys=(
        *dense_keys(query_groups=None, head_dim=None, epsilon=1e-5, theta=1e6),
        Key("qk_norm", "", "qk_layernorm", "flag", default=True),
    ),
    required_args=("qk_layernorm",),
    before=(
        column_parallel(
            "embedding.word_embeddings.weight",
            part("transformer.wte.weight", "vocab hidden"),
            padded_rows="padded_vocab",
        ),
    ),
    layer=(
        norm(
            f"{MEGATRON}.input_layernorm.weight",
            part(f"{HF}.ln_1.weight", "hidden"),
            transformer_engine=f"{ATTENTION}.linear_qkv.layer_norm_weight",
        ),
        column_parallel(
            f"{ATTENTION}.linear_qkv.weight",
            part(f"{HF}.attn.query.weight", "query hidden"),
            part(f"{HF}.attn.key.weight", "key_value hidden"),
            part(f"{HF}.attn.value.weight", "key_value hidden"),
            by_query_group=True,
        ),
        norm(f"{ATTENTION}.q_layernorm.weight", part(f"{HF}.attn.ln_q.weight", "head_dim")),
        norm(f"{ATTENTION}.k_layernorm.weight", part(f"{HF}.attn.ln_k.weight", "head_dim")),
        row_parallel(f"{ATTENTION}.linear_proj.weight", part(f"{HF}.attn.out.weight", "hidden query")),
        norm(
            f"{MEGATRON}.pre_mlp_layernorm.weight",
            part(f"{HF}.ln_2.weight", "hidden"),
            transformer_engine=f"{MLP}.linear_fc1.layer_norm_weight",
        ),
        column_parallel(
            f"{MLP}.linear_fc1.weight",
            part(f"{HF}.ffn.w1.weight", "ffn hidden"),
            part(f"{HF}.ffn.w3.weight", "ffn hidden"),
        ),
        row_parallel(f"{MLP}.linear_fc2.weight", part(f"{HF}.ffn.w2.weight", "hidden ffn")),
    ),
    after=(
        norm("decoder.final_layernorm.weight", part("transformer.ln_f.weight", "hidden")),
        column_parallel(
            "output_layer.weight", part("head.weight", "vocab hidden"), padded_rows="padded_vocab", unless="tied"
        ),
    ),
)

#: Parts of Qwen3's names -> of these.
OF_QWEN3 = {
    "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "head",
    "model.layers": "transformer.h", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.query", "self_attn.k_proj": "attn.key", "self_attn.v_proj": "attn.value",
    "self_attn.o_proj": "attn.out", "self_attn.q_norm": "attn.ln_q", "self_attn.k_norm": "attn.ln_k",
    "mlp.gate_proj": "ffn.w1", "mlp.up_proj": "ffn.w3", "mlp.down_proj": "ffn.w2",
}  # fmt: skip
