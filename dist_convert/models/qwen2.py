"""Qwen2 and 2.5: biases of queries, keys and values."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family

QWEN2 = Family(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    # The defaults of its class are alike in transformers 4.49 and 5.24.
    keys=(*blocks.dense_keys(query_groups=32, head_dim=None, epsilon=1e-6, theta=10000.0), blocks.QKV_BIAS_KEY),
    required_args=("add_qkv_bias",),
    excluded_args=("add_bias_linear", "window_size", "qk_layernorm"),
    config_pins=blocks.NO_WINDOW,
    layer=(blocks.ATTENTION_NORM, blocks.QKV, blocks.QKV_BIAS, blocks.OUTPUT),
    dense=blocks.DENSE,
)
