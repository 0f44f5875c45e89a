"""Llama 2, 3, 3.1, 3.2 and 3.3, and the models that were made like them."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family, Key

LLAMA = Family(
    name="llama",
    hf_class="LlamaForCausalLM",
    # The defaults of LlamaConfig are alike in transformers 4.49 and 5.23.
    keys=(
        *blocks.dense_keys(query_groups=None, head_dim=None, epsilon=1e-6, theta=10000.0),
        Key("qkv_bias", "attention_bias", "add_qkv_bias", "flag"),
        Key("linear_bias", "mlp_bias", "add_bias_linear", "flag"),
    ),
    excluded_args=("add_qkv_bias", "window_size", "qk_layernorm", "no_rope_freq"),
    config={"pretraining_tp": 1},
    layer=(
        blocks.ATTENTION_NORM,
        blocks.QKV,
        blocks.QKV_BIAS,
        blocks.OUTPUT,
        blocks.OUTPUT_BIAS,
        blocks.OUTPUT_BIAS_OF_ZEROS,
    ),
    dense=blocks.DENSE,
    special_ids=(1, 2),
)
