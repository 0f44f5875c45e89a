"""Qwen1.5 and Qwen2 with experts, of which some are shared and have a gate."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family, Key, part, replicated

QWEN2_MOE = Family(
    name="qwen2_moe",
    hf_class="Qwen2MoeForCausalLM",
    # The defaults of its class are alike in transformers 4.49 and 5.24.
    keys=(
        *blocks.dense_keys(query_groups=16, head_dim=None, epsilon=1e-6, theta=10000.0),
        *blocks.expert_keys(experts=60, per_token=4, ffn=1408),
        Key("shared_ffn", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=5632),
        Key("shared_gate", "", "moe_shared_expert_gate", "flag", default=True),
        *blocks.SPARSE_KEYS,
        blocks.QKV_BIAS_KEY,
    ),
    required_args=("add_qkv_bias", "moe_shared_expert_gate"),
    excluded_args=("qk_layernorm", "window_size"),
    config={"output_router_logits": False},
    config_pins={**blocks.NO_WINDOW, "qkv_bias": True},
    layer=(blocks.ATTENTION_NORM, blocks.QKV, blocks.QKV_BIAS, blocks.OUTPUT),
    dense=blocks.DENSE,
    moe=(
        blocks.MOE_NORM,
        blocks.ROUTER,
        *blocks.EXPERTS,
        *blocks.shared_experts("shared_expert"),
        replicated(
            f"{blocks.MEGATRON}.mlp.shared_experts.gate_weight",
            part(f"{blocks.HF}.mlp.shared_expert_gate.weight", "one hidden"),
        ),
    ),
)
