"""Qwen1.5 and Qwen2 with experts, of which some are shared and have a gate."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family, Key, column_parallel, part, replicated, row_parallel

_MEGATRON_SHARED, _HF_SHARED = f"{blocks.MEGATRON}.mlp.shared_experts", f"{blocks.HF}.mlp.shared_expert"

QWEN2_MOE = Family(
    name="qwen2_moe",
    hf_class="Qwen2MoeForCausalLM",
    # The defaults of its class are alike in transformers 4.49 and 5.24.
    keys=(
        *blocks.dense_keys(query_groups=16, head_dim=None, epsilon=1e-6, theta=10000.0),
        *blocks.expert_keys(experts=60, per_token=4, ffn=1408, aux_loss=0.001),
        Key("shared_ffn", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=5632),
        Key("shared_gate", "", "moe_shared_expert_gate", "flag", default=True),
        *blocks.SPARSE_KEYS,
        blocks.QKV_BIAS_KEY,
    ),
    signs={
        "add_qkv_bias": True,
        "num_experts": True,
        "moe_shared_expert_gate": True,
        "qk_layernorm": False,
        "window_size": False,
        "multi_latent_attention": False,
    },
    config={"output_router_logits": False},
    config_pins={**blocks.NO_WINDOW, "qkv_bias": True},
    before=blocks.EMBEDDING,
    layer=(blocks.ATTENTION_NORM, blocks.QKV, blocks.QKV_BIAS, blocks.OUTPUT),
    dense=(blocks.MLP_NORM, *blocks.MLP),
    moe=(
        blocks.MOE_NORM,
        blocks.ROUTER,
        *blocks.EXPERTS,
        column_parallel(
            f"{_MEGATRON_SHARED}.linear_fc1.weight",
            part(f"{_HF_SHARED}.gate_proj.weight", "shared_ffn hidden"),
            part(f"{_HF_SHARED}.up_proj.weight", "shared_ffn hidden"),
        ),
        row_parallel(
            f"{_MEGATRON_SHARED}.linear_fc2.weight", part(f"{_HF_SHARED}.down_proj.weight", "hidden shared_ffn")
        ),
        replicated(f"{_MEGATRON_SHARED}.gate_weight", part(f"{blocks.HF}.mlp.shared_expert_gate.weight", "one hidden")),
    ),
    after=blocks.FINAL_NORM_AND_HEAD,
)
