"""Qwen3 without experts: norms of queries and keys."""

from dist_convert.models.blocks import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM_AND_HEAD,
    MLP,
    MLP_NORM,
    NO_WINDOW,
    OUTPUT,
    QK_NORM_KEY,
    QK_NORMS,
    QKV,
    dense_keys,
)
from dist_convert.models.schema import Family

QWEN3 = Family(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    # The defaults of its class are alike in transformers 4.51 and 5.24.
    keys=(
        *dense_keys(query_groups=32, head_dim=128, epsilon=1e-6, theta=10000.0),
        QK_NORM_KEY,
    ),
    pins=(),
    signs={"qk_layernorm": True, "num_experts": False, "window_size": False, "multi_latent_attention": False},
    config={},
    config_pins={**NO_WINDOW, "attention_bias": False},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, *QK_NORMS, OUTPUT),
    dense=(MLP_NORM, *MLP),
    after=FINAL_NORM_AND_HEAD,
)
