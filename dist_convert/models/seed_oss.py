"""Seed-OSS: a Qwen2 whose heads have a width of their own."""

from dataclasses import replace

from dist_convert.models.blocks import dense_keys
from dist_convert.models.qwen2 import QWEN2
from dist_convert.models.schema import Key

SEED_OSS = replace(
    QWEN2,
    name="seed_oss",
    hf_class="SeedOssForCausalLM",
    # The defaults of SeedOssConfig in transformers 5.24.
    keys=(
        *dense_keys(query_groups=8, head_dim=128, epsilon=1e-6, theta=10000.0),
        Key("qkv_bias", "attention_bias", "add_qkv_bias", "flag", default=True),
    ),
    config={"residual_dropout": 0.0},
    config_pins={"attention_out_bias": False, "mlp_bias": False},
    special_ids=(0, 2),
)
