"""Mistral, Nemo and Ministral: a Llama whose attention may have a window."""

from dist_convert.models.blocks import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM_AND_HEAD,
    MLP,
    MLP_NORM,
    OUTPUT,
    QKV,
    dense_keys,
)
from dist_convert.models.schema import Family, Key

MISTRAL = Family(
    name="mistral",
    hf_class="MistralForCausalLM",
    # The defaults of MistralConfig are alike in transformers 4.49 and 5.24.
    keys=(
        *dense_keys(query_groups=8, head_dim=None, epsilon=1e-6, theta=10000.0),
        Key("sliding_window", "sliding_window", "window_size", default=4096, codec="window"),
    ),
    pins=(),
    signs={
        "add_qkv_bias": False,
        "num_experts": False,
        "qk_layernorm": False,
        "multi_latent_attention": False,
        "no_rope_freq": False,
    },
    config={},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, OUTPUT),
    dense=(MLP_NORM, *MLP),
    after=FINAL_NORM_AND_HEAD,
    special_ids=(1, 2),
)
