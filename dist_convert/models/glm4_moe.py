"""GLM-4.5 and 4.6: grouped queries with biases, half of each head rotated, and DeepSeek-V3's experts."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family, Key, Pin

GLM4_MOE = Family(
    name="glm4_moe",
    hf_class="Glm4MoeForCausalLM",
    # The defaults of Glm4MoeConfig in transformers 5.24.
    keys=(
        *blocks.dense_keys(query_groups=8, head_dim=None, epsilon=1e-5, theta=10000.0),
        Key("qkv_bias", "attention_bias", "add_qkv_bias", "flag"),
        Key("qk_norm", "use_qk_norm", "qk_layernorm", "flag"),
        *blocks.routed_keys(experts=128, per_token=8, ffn=1408, dense=1, shared=1, scale=1.0),
        *blocks.group_keys(groups=1, chosen=1),
        blocks.MTP_KEY,
    ),
    pins=(
        Pin("rotary_percent", (0.5,), "the family rotates half of each head", is_written=True),
        Pin("partial_rotary_factor", (None, 0.5), "the family rotates half of each head"),
        Pin("position_embedding_type", ("rope",), "Megatron's YaRN rotates all of each head", is_written=True),
        *blocks.SIGMOID_PINS,
    ),
    required_args=("moe_router_enable_expert_bias",),
    config_pins={"norm_topk_prob": True, "partial_rotary_factor": 0.5},
    layer=(blocks.ATTENTION_NORM, blocks.QKV, blocks.QKV_BIAS, *blocks.QK_NORMS, blocks.OUTPUT),
    dense=blocks.DENSE,
    moe=(blocks.MOE_NORM, blocks.ROUTER, blocks.ROUTER_BIAS, *blocks.EXPERTS, *blocks.SHARED_EXPERTS),
    prediction=blocks.PREDICTION,
    copies=blocks.PREDICTION_COPIES,
    products=(blocks.SHARED_SIZE,),
    scalings=("default", "llama3", "linear"),
)
