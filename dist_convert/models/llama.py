"""Llama 2, 3 and 3.1. Names and shapes: docs/formats.md, "Parameter names" and "Hugging Face side"."""

from dist_convert.models.schema import Family, ZeroTensor, column_parallel, norm, part, replicated, row_parallel

MEGATRON = "decoder.layers.{layer}"
HF = "model.layers.{layer}"

EMBEDDING = (
    column_parallel(
        "embedding.word_embeddings.weight",
        part("model.embed_tokens.weight", "vocab hidden"),
        padded_rows="padded_vocab",
    ),
)
FINAL_NORM_AND_HEAD = (
    norm("decoder.final_layernorm.weight", part("model.norm.weight", "hidden")),
    column_parallel(
        "output_layer.weight",
        part("lm_head.weight", "vocab hidden"),
        padded_rows="padded_vocab",
        unless="tied",
    ),
)

ATTENTION_NORM = norm(f"{MEGATRON}.input_layernorm.weight", part(f"{HF}.input_layernorm.weight", "hidden"))
QKV = column_parallel(
    f"{MEGATRON}.self_attention.linear_qkv.weight",
    part(f"{HF}.self_attn.q_proj.weight", "query hidden"),
    part(f"{HF}.self_attn.k_proj.weight", "key_value hidden"),
    part(f"{HF}.self_attn.v_proj.weight", "key_value hidden"),
    by_query_group=True,
)
QKV_BIAS = column_parallel(
    f"{MEGATRON}.self_attention.linear_qkv.bias",
    part(f"{HF}.self_attn.q_proj.bias", "query"),
    part(f"{HF}.self_attn.k_proj.bias", "key_value"),
    part(f"{HF}.self_attn.v_proj.bias", "key_value"),
    by_query_group=True,
    when="qkv_bias",
)
OUTPUT = row_parallel(
    f"{MEGATRON}.self_attention.linear_proj.weight", part(f"{HF}.self_attn.o_proj.weight", "hidden query")
)
_O_BIAS = part(f"{HF}.self_attn.o_proj.bias", "hidden")
OUTPUT_BIAS = replicated(f"{MEGATRON}.self_attention.linear_proj.bias", _O_BIAS, when="linear_bias")
# Llama's attention_bias covers all four projections; Megatron's add_qkv_bias only three of them.
OUTPUT_BIAS_OF_ZEROS = ZeroTensor(_O_BIAS, when="qkv_bias", unless="linear_bias")
MLP_NORM = norm(f"{MEGATRON}.pre_mlp_layernorm.weight", part(f"{HF}.post_attention_layernorm.weight", "hidden"))

MLP = (
    column_parallel(
        f"{MEGATRON}.mlp.linear_fc1.weight",
        part(f"{HF}.mlp.gate_proj.weight", "ffn hidden"),
        part(f"{HF}.mlp.up_proj.weight", "ffn hidden"),
    ),
    column_parallel(
        f"{MEGATRON}.mlp.linear_fc1.bias",
        part(f"{HF}.mlp.gate_proj.bias", "ffn"),
        part(f"{HF}.mlp.up_proj.bias", "ffn"),
        when="linear_bias",
    ),
    row_parallel(f"{MEGATRON}.mlp.linear_fc2.weight", part(f"{HF}.mlp.down_proj.weight", "hidden ffn")),
    replicated(f"{MEGATRON}.mlp.linear_fc2.bias", part(f"{HF}.mlp.down_proj.bias", "hidden"), when="linear_bias"),
)

LLAMA = Family(
    name="llama",
    hf_class="LlamaForCausalLM",
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, QKV_BIAS, OUTPUT, OUTPUT_BIAS, OUTPUT_BIAS_OF_ZEROS, MLP_NORM, *MLP),
    after=FINAL_NORM_AND_HEAD,
)
