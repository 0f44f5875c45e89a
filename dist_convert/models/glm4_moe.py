"""GLM-4.5 and 4.6: grouped queries with biases, half of each head rotated, and DeepSeek-V3's experts."""

from dist_convert.models.blocks import (
    ATTENTION_NORM,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM_AND_HEAD,
    MLP,
    MLP_NORM,
    MOE_NORM,
    OUTPUT,
    QK_NORMS,
    QKV,
    QKV_BIAS,
    ROUTER,
    ROUTER_BIAS,
    SHARED_EXPERTS,
    SHARED_SIZE,
    SIGMOID_PINS,
    dense_keys,
    group_keys,
    routed_keys,
)
from dist_convert.models.prediction import MTP_KEY, PREDICTION, PREDICTION_COPIES
from dist_convert.models.schema import Family, Key, Pin

GLM4_MOE = Family(
    name="glm4_moe",
    hf_class="Glm4MoeForCausalLM",
    # The defaults of Glm4MoeConfig in transformers 5.24.
    keys=(
        *dense_keys(query_groups=8, head_dim=None, epsilon=1e-5, theta=10000.0),
        Key("qkv_bias", "attention_bias", "add_qkv_bias", "flag"),
        Key("qk_norm", "use_qk_norm", "qk_layernorm", "flag"),
        *routed_keys(experts=128, per_token=8, ffn=1408, dense=1, shared=1, scale=1.0),
        *group_keys(groups=1, chosen=1),
        MTP_KEY,
    ),
    pins=(
        Pin("rotary_percent", (0.5,), "the family rotates half of each head", is_written=True),
        Pin("partial_rotary_factor", (None, 0.5), "the family rotates half of each head"),
        *SIGMOID_PINS,
    ),
    signs={"num_experts": True, "multi_latent_attention": False, "moe_router_enable_expert_bias": True},
    config={},
    config_pins={"norm_topk_prob": True, "partial_rotary_factor": 0.5},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, QKV_BIAS, *QK_NORMS, OUTPUT),
    dense=(MLP_NORM, *MLP),
    moe=(MOE_NORM, ROUTER, ROUTER_BIAS, *EXPERTS, *SHARED_EXPERTS),
    after=FINAL_NORM_AND_HEAD,
    prediction=PREDICTION,
    copies=PREDICTION_COPIES,
    products=(SHARED_SIZE,),
)
