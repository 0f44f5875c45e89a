"""Qwen3 with experts."""

from dist_convert.models.blocks import (
    ATTENTION_NORM,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM_AND_HEAD,
    MLP,
    MLP_NORM,
    MOE_NORM,
    NO_WINDOW,
    OUTPUT,
    QK_NORM_KEY,
    QK_NORMS,
    QKV,
    ROUTER,
    SPARSE_KEYS,
    dense_keys,
    expert_keys,
)
from dist_convert.models.schema import Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    # The defaults of its class are alike in transformers 4.51 and 5.24.
    keys=(
        *dense_keys(query_groups=4, head_dim=None, epsilon=1e-6, theta=10000.0),
        *expert_keys(experts=128, per_token=8, ffn=768, aux_loss=0.001),
        *SPARSE_KEYS,
        QK_NORM_KEY,
    ),
    pins=(),
    signs={
        "qk_layernorm": True,
        "num_experts": True,
        "window_size": False,
        "multi_latent_attention": False,
        "moe_shared_expert_intermediate_size": False,
    },
    config={"output_router_logits": False},
    config_pins={**NO_WINDOW, "attention_bias": False},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, *QK_NORMS, OUTPUT),
    dense=(MLP_NORM, *MLP),
    moe=(MOE_NORM, ROUTER, *EXPERTS),
    after=FINAL_NORM_AND_HEAD,
)
