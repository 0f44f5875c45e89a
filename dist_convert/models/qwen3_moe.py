"""Qwen3 with experts."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    # The defaults of its class are alike in transformers 4.51 and 5.24.
    keys=(
        *blocks.dense_keys(query_groups=4, head_dim=None, epsilon=1e-6, theta=10000.0),
        *blocks.expert_keys(experts=128, per_token=8, ffn=768),
        *blocks.SPARSE_KEYS,
        blocks.QK_NORM_KEY,
    ),
    required_args=("qk_layernorm",),
    excluded_args=("window_size", "moe_shared_expert_intermediate_size"),
    config={"output_router_logits": False},
    config_pins={**blocks.NO_WINDOW, "attention_bias": False},
    layer=(blocks.ATTENTION_NORM, blocks.QKV, *blocks.QK_NORMS, blocks.OUTPUT),
    dense=blocks.DENSE,
    moe=(blocks.MOE_NORM, blocks.ROUTER, *blocks.EXPERTS),
)
