"""Qwen2 and 2.5: biases of queries, keys and values."""

from dist_convert.models import blocks
from dist_convert.models.schema import Family

QWEN2 = Family(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    # The defaults of its class are alike in transformers 4.49 and 5.24.
    keys=(
        *blocks.dense_keys(query_groups=32, head_dim=None, epsilon=1e-6, theta=10000.0),
        blocks.QKV_BIAS_KEY,
    ),
    signs={
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "num_experts": False,
        "window_size": False,
        "qk_layernorm": False,
        "multi_latent_attention": False,
    },
    config_pins=blocks.NO_WINDOW,
    before=blocks.EMBEDDING,
    layer=(blocks.ATTENTION_NORM, blocks.QKV, blocks.QKV_BIAS, blocks.OUTPUT),
    dense=(blocks.MLP_NORM, *blocks.MLP),
    after=blocks.FINAL_NORM_AND_HEAD,
)
