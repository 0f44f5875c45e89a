"""DeepSeek-V3 and R1, Moonlight and Kimi K2: latent attention, a router that is corrected by a bias, shared experts."""

from dataclasses import replace

from dist_convert.models import blocks
from dist_convert.models.schema import Family, Key, Pin, Product, Row, column_parallel, norm, row_parallel


def _projection(megatron: str, hf: str, dims: str, *, when: str | None = None, unless: str | None = None) -> Row:
    weights = blocks.attention(f"{megatron}.weight"), blocks.hf_attention(f"{hf}.weight", dims)
    return column_parallel(*weights, when=when, unless=unless)


#: Of the latent attention: docs/formats.md, "Latent attention".
LATENT_ATTENTION = (
    # Nothing fuses the norm before it, as two projections read it.
    replace(blocks.ATTENTION_NORM, transformer_engine="", habana=""),
    _projection("linear_q_proj", "q_proj", "latent_query hidden", unless="q_rank"),
    replace(_projection("linear_q_down_proj", "q_a_proj", "q_rank hidden", when="q_rank"), is_whole_in_te=True),
    norm(
        blocks.attention("q_layernorm.weight"),
        blocks.hf_attention("q_a_layernorm.weight", "q_rank"),
        transformer_engine=blocks.attention("linear_q_up_proj.layer_norm_weight"),
        when="q_rank",
    ),
    _projection("linear_q_up_proj", "q_b_proj", "latent_query q_rank", when="q_rank"),
    replace(_projection("linear_kv_down_proj", "kv_a_proj_with_mqa", "latent_width hidden"), is_whole_in_te=True),
    norm(
        blocks.attention("kv_layernorm.weight"),
        blocks.hf_attention("kv_a_layernorm.weight", "kv_rank"),
        transformer_engine=blocks.attention("linear_kv_up_proj.layer_norm_weight"),
    ),
    _projection("linear_kv_up_proj", "kv_b_proj", "latent_key_value kv_rank"),
    row_parallel(blocks.attention("linear_proj.weight"), blocks.hf_attention("o_proj.weight", "hidden latent_output")),
)

#: The widths of a head's parts, and what follows from them.
LATENT_KEYS = (
    Key("query_groups", "num_key_value_heads", ""),
    Key("head_dim", "v_head_dim", "v_head_dim", default=128),
    Key("q_rank", "q_lora_rank", "q_lora_rank", default=1536, codec="or_none"),
    Key("kv_rank", "kv_lora_rank", "kv_lora_rank", default=512),
    Key("plain_dim", "qk_nope_head_dim", "qk_head_dim", default=128),
    Key("rotary_dim", "qk_rope_head_dim", "qk_pos_emb_head_dim", default=64),
)
LATENT_SIZES = (
    Product("latent_query", "heads", ("plain_dim", "rotary_dim")),
    Product("latent_width", "", ("kv_rank", "rotary_dim")),
    Product("latent_key_value", "heads", ("plain_dim", "head_dim")),
    Product("latent_output", "heads", ("head_dim",)),
)
LATENT_PINS = (
    Pin("multi_latent_attention", (True,), "the family has latent attention", is_written=True),
    Pin("qk_layernorm", (True,), "the latents of the family have norms", is_written=True),
    Pin("position_embedding_type", ("rope",), "YaRN of latent attention is rope_type yarn", is_written=True),
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    hf_class="DeepseekV3ForCausalLM",
    # The defaults of DeepseekV3Config in transformers 5.24.
    keys=(
        *blocks.basic_keys(*LATENT_KEYS, epsilon=1e-6, theta=10000.0),
        *blocks.routed_keys(experts=256, per_token=8, ffn=2048, dense=3, shared=1, scale=2.5),
        *blocks.group_keys(groups=8, chosen=4),
        blocks.MTP_KEY,
    ),
    pins=(*LATENT_PINS, *blocks.SIGMOID_PINS),
    required_args=("moe_router_enable_expert_bias",),
    config={"ep_size": 1, "seq_aux": True},
    config_pins={
        "norm_topk_prob": True,
        "attention_bias": False,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_interleave": True,
    },
    layer=LATENT_ATTENTION,
    dense=blocks.DENSE,
    moe=(blocks.MOE_NORM, blocks.ROUTER, blocks.ROUTER_BIAS, *blocks.EXPERTS, *blocks.SHARED_EXPERTS),
    prediction=blocks.PREDICTION,
    copies=blocks.PREDICTION_COPIES,
    special_ids=(0, 1),
    products=(*LATENT_SIZES, blocks.SHARED_SIZE),
    other_types=("kimi_k2",),
    scalings=("default", "yarn"),
)
