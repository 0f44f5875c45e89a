"""Qwen3 without experts: norms of queries and keys."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family

QWEN3 = Family(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    # The defaults of its class are alike in transformers 4.51 and 5.24.
    keys=(*blocks.dense_keys(query_groups=32, head_dim=128, epsilon=1e-6, theta=10000.0), blocks.QK_NORM_KEY),
    required_args=("qk_layernorm",),
    excluded_args=("window_size",),
    config_pins={**blocks.NO_WINDOW, "attention_bias": False},
    layer=(blocks.ATTENTION_NORM, blocks.QKV, *blocks.QK_NORMS, blocks.OUTPUT),
    dense=blocks.DENSE,
)
