"""Llama 2, 3 and 3.1. Names and shapes: docs/formats.md, "Parameter names" and "Hugging Face side"."""

from dist_convert.models.schema import (
    MOST_LAYERS,
    Family,
    Key,
    Pin,
    ZeroTensor,
    column_parallel,
    norm,
    part,
    replicated,
    row_parallel,
)

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

#: With the defaults of LlamaConfig, alike in transformers 4.49 and 5.23.
_KEYS = (
    Key("vocab", "vocab_size", "vocab_size", default=32000),
    Key("hidden", "hidden_size", "hidden_size", default=4096),
    Key("ffn", "intermediate_size", "ffn_hidden_size", default=11008),
    Key("layers", "num_hidden_layers", "num_layers", default=32, most=MOST_LAYERS),
    Key("heads", "num_attention_heads", "num_attention_heads", default=32),
    Key("query_groups", "num_key_value_heads", "num_query_groups"),
    Key("head_dim", "head_dim", "kv_channels"),
    Key("max_positions", "max_position_embeddings", "max_position_embeddings", default=2048),
    Key("norm_epsilon", "rms_norm_eps", "norm_epsilon", "number", default=1e-6, arg_default=1e-5),
    Key("rope_theta", "rope_theta", "rotary_base", "number", default=10000.0, arg_default=10000.0),
    Key("tied", "tie_word_embeddings", "untie_embeddings_and_output_weights", "flag", is_opposite=True),
    Key("qkv_bias", "attention_bias", "add_qkv_bias", "flag"),
    Key("linear_bias", "mlp_bias", "add_bias_linear", "flag"),
)

#: Of every family here. Older and newer versions of Megatron know fewer or more of them.
COMMON_PINS = (
    Pin("position_embedding_type", ("rope",), "Llama and Mixtral have rotary positions only", is_written=True),
    Pin("rotary_percent", (1.0, 1), "LlamaConfig has no partial rotary dimension", is_written=True),
    Pin("rotary_interleaved", (False, None), "transformers rotates halves, not neighbouring pairs", is_written=True),
    Pin("normalization", ("RMSNorm",), "Llama and Mixtral normalise by RMSNorm", is_written=True),
    Pin("swiglu", (True,), "Llama and Mixtral have gated SiLU MLPs", is_written=True),
    Pin("multi_latent_attention", (False, None), "neither family has latent attention", is_written=True),
    Pin("mtp_num_layers", (None, 0), "neither family has multi-token prediction layers", is_written=True),
    Pin("qk_layernorm", (False, None), "neither family has query and key norms", is_written=True),
    Pin("qk_l2_norm", (False, None), "neither family normalises queries and keys"),
    Pin("no_rope_freq", (None, 0), "neither family has layers without rotary positions"),
    Pin("softmax_scale", (None,), "transformers scales attention by the root of head_dim"),
    Pin("attention_output_gate", (False, None), "neither family gates its attention output"),
    Pin("softmax_type", ("vanilla", None), "neither family has attention sinks"),
    Pin("apply_residual_connection_post_layernorm", (False, None), "both families are pre-norm"),
    Pin("apply_norm_post_sub_block", (False, None), "both families are pre-norm"),
    Pin("heterogeneous_layers_config_path", (None,), "all layers of both families are alike"),
    Pin("heterogeneous_layers_config_encoded_json", (None, ""), "all layers of both families are alike"),
    Pin("glu_linear_offset", (None, 0, 0.0), "transformers adds nothing to the up projection"),
    Pin("activation_func_clamp_value", (None,), "transformers does not clamp the activation"),
    Pin("use_mup", (False, None), "transformers knows no maximal update parametrisation"),
    Pin(
        "rotary_seq_len_interpolation_factor",
        (None, 1, 1.0),
        "most Megatron versions ignore it, so it cannot be told whether the model was trained with it; if it was not, "
        "save the checkpoint without the argument",
        is_written=True,
    ),
    Pin("gtp_weight_remat_size", (None, 1), "weights sharded on an axis that the directory names lack"),
    Pin(
        "rope_scaling_factor",
        (8.0, 8),
        "training scripts pass the flag only, so models are trained with 8.0",
        is_written=True,
        when="use_rope_scaling",
    ),
)

LLAMA = Family(
    name="llama",
    hf_class="LlamaForCausalLM",
    keys=_KEYS,
    pins=COMMON_PINS,
    config={"pretraining_tp": 1},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, QKV_BIAS, OUTPUT, OUTPUT_BIAS, OUTPUT_BIAS_OF_ZEROS, MLP_NORM, *MLP),
    after=FINAL_NORM_AND_HEAD,
)
