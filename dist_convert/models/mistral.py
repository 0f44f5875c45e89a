"""Mistral, Nemo and Ministral: a Llama whose attention may have a window."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family, Key

MISTRAL = Family(
    name="mistral",
    hf_class="MistralForCausalLM",
    # The defaults of MistralConfig are alike in transformers 4.49 and 5.24.
    keys=(
        *blocks.dense_keys(query_groups=8, head_dim=None, epsilon=1e-6, theta=10000.0),
        Key("sliding_window", "sliding_window", "window_size", default=4096, codec="window"),
    ),
    excluded_args=("add_qkv_bias", "qk_layernorm", "no_rope_freq"),
    layer=(blocks.ATTENTION_NORM, blocks.QKV, blocks.OUTPUT),
    dense=blocks.DENSE,
    special_ids=(1, 2),
)
