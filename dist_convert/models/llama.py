"""Llama 2, 3, 3.1, 3.2 and 3.3, and the models that were made like them."""

from dist_convert.models.blocks import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM_AND_HEAD,
    MLP,
    MLP_NORM,
    OUTPUT,
    OUTPUT_BIAS,
    OUTPUT_BIAS_OF_ZEROS,
    QKV,
    QKV_BIAS,
    dense_keys,
)
from dist_convert.models.schema import Family, Key

LLAMA = Family(
    name="llama",
    hf_class="LlamaForCausalLM",
    # The defaults of LlamaConfig are alike in transformers 4.49 and 5.23.
    keys=(
        *dense_keys(query_groups=None, head_dim=None, epsilon=1e-6, theta=10000.0),
        Key("qkv_bias", "attention_bias", "add_qkv_bias", "flag"),
        Key("linear_bias", "mlp_bias", "add_bias_linear", "flag"),
    ),
    pins=(),
    signs={
        "num_experts": False,
        "add_qkv_bias": False,
        "window_size": False,
        "qk_layernorm": False,
        "no_rope_freq": False,
        "multi_latent_attention": False,
    },
    config={"pretraining_tp": 1},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, QKV_BIAS, OUTPUT, OUTPUT_BIAS, OUTPUT_BIAS_OF_ZEROS),
    dense=(MLP_NORM, *MLP),
    after=FINAL_NORM_AND_HEAD,
    special_ids=(1, 2),
)
