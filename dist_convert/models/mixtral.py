"""Mixtral: Llama's attention, then a router and gated experts."""

from dataclasses import replace

from dist_convert.models import blocks
from dist_convert.models.schema import Alias, Family, Key, column_parallel, part, replicated, row_parallel

_MOE, _FUSED = f"{blocks.HF}.block_sparse_moe", f"{blocks.HF}.mlp"
_EXPERT, _MEGATRON_EXPERT = f"{_MOE}.experts.{{expert}}", f"{blocks.MEGATRON}.mlp.experts.{{expert}}"
#: What transformers 5 has in memory, and saves where it is asked to: of each expert, rows 0..F are w1 and F..2F w3.
_W1_W3 = Alias(f"{_FUSED}.experts.gate_up_proj", is_stacked=True, rows=("ffn", "ffn"))
_W2 = Alias(f"{_FUSED}.experts.down_proj", is_stacked=True)

MIXTRAL = Family(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    # The defaults of MixtralConfig are alike in transformers 4.49 and 5.23.
    keys=(
        *blocks.dense_keys(query_groups=8, head_dim=None, epsilon=1e-5, theta=1000000.0),
        *blocks.router_keys("num_local_experts", experts=8, per_token=2),
        Key("sliding_window", "sliding_window", "window_size", codec="window"),
    ),
    excluded_args=(
        "add_qkv_bias",
        "moe_router_enable_expert_bias",
        "qk_layernorm",
        "moe_shared_expert_intermediate_size",
        "softmax_type",
    ),
    config={"router_jitter_noise": 0.0, "output_router_logits": False},
    layer=(blocks.ATTENTION_NORM, blocks.QKV, blocks.OUTPUT),
    moe=(
        blocks.MOE_NORM,
        replicated(
            f"{blocks.MEGATRON}.mlp.router.weight",
            part(f"{_MOE}.gate.weight", "experts hidden", Alias(f"{_FUSED}.gate.weight")),
        ),
        column_parallel(
            f"{_MEGATRON_EXPERT}.linear_fc1.weight",
            part(f"{_EXPERT}.w1.weight", "ffn hidden", _W1_W3),  # gate
            part(f"{_EXPERT}.w3.weight", "ffn hidden", replace(_W1_W3, part=1)),  # up
        ),
        row_parallel(
            f"{_MEGATRON_EXPERT}.linear_fc2.weight",
            part(f"{_EXPERT}.w2.weight", "hidden ffn", _W2),  # down
        ),
    ),
    special_ids=(1, 2),
)
