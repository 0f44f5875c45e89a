"""Seed-OSS: a Qwen2 whose heads have a width of their own."""

from dist_convert.models.blocks import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM_AND_HEAD,
    MLP,
    MLP_NORM,
    OUTPUT,
    QKV,
    QKV_BIAS,
    dense_keys,
)
from dist_convert.models.schema import Family, Key

SEED_OSS = Family(
    name="seed_oss",
    hf_class="SeedOssForCausalLM",
    # The defaults of SeedOssConfig in transformers 5.24.
    keys=(
        *dense_keys(query_groups=8, head_dim=128, epsilon=1e-6, theta=10000.0),
        Key("qkv_bias", "attention_bias", "add_qkv_bias", "flag", default=True),
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
    config={"residual_dropout": 0.0},
    config_pins={"attention_out_bias": False, "mlp_bias": False},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, QKV_BIAS, OUTPUT),
    dense=(MLP_NORM, *MLP),
    after=FINAL_NORM_AND_HEAD,
    special_ids=(0, 2),
)
