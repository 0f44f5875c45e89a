"""Qwen2 and 2.5: biases of queries, keys and values."""

from dist_convert.models.blocks import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM_AND_HEAD,
    MLP,
    MLP_NORM,
    NO_WINDOW,
    OUTPUT,
    QKV,
    QKV_BIAS,
    QKV_BIAS_KEY,
    dense_keys,
)
from dist_convert.models.schema import Family

QWEN2 = Family(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    # The defaults of its class are alike in transformers 4.49 and 5.24.
    keys=(
        *dense_keys(query_groups=32, head_dim=None, epsilon=1e-6, theta=10000.0),
        QKV_BIAS_KEY,
    ),
    pins=(),
    signs={
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "num_experts": False,
        "window_size": False,
        "qk_layernorm": False,
        "multi_latent_attention": False,
    },
    config={},
    config_pins=NO_WINDOW,
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, QKV_BIAS, OUTPUT),
    dense=(MLP_NORM, *MLP),
    after=FINAL_NORM_AND_HEAD,
)
