"""Qwen2 and 2.5, Qwen3, and both with experts."""

from dist_convert.models.blocks import (
    ATTENTION_NORM,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM_AND_HEAD,
    HF,
    MEGATRON,
    MLP,
    MLP_NORM,
    MOE_NORM,
    OUTPUT,
    QK_NORMS,
    QKV,
    QKV_BIAS,
    ROUTER,
    dense_keys,
    expert_keys,
)
from dist_convert.models.schema import Family, Key, column_parallel, part, replicated, row_parallel

_QKV_BIAS = Key("qkv_bias", "", "add_qkv_bias", "flag", default=True)
_QK_NORM = Key("qk_norm", "", "qk_layernorm", "flag", default=True)
_MOE = (
    Key("dense_layers", "decoder_sparse_step", "moe_layer_freq", default=1, codec="sparse_steps"),
    Key("norm_topk_prob", "norm_topk_prob", "moe_router_pre_softmax", "flag", codec="opposite"),
)
_NO_WINDOW = {"use_sliding_window": False}
_MEGATRON_SHARED, _HF_SHARED = f"{MEGATRON}.mlp.shared_experts", f"{HF}.mlp.shared_expert"

QWEN2 = Family(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    # The defaults of the classes of this file are alike in transformers 4.49 (Qwen3: 4.51) and 5.24.
    keys=(
        *dense_keys(
            vocab=151936,
            hidden=4096,
            ffn=22016,
            layers=32,
            heads=32,
            query_groups=32,
            head_dim=None,
            positions=32768,
            epsilon=1e-6,
            theta=10000.0,
        ),
        _QKV_BIAS,
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
    config_pins=_NO_WINDOW,
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, QKV_BIAS, OUTPUT),
    dense=(MLP_NORM, *MLP),
    after=FINAL_NORM_AND_HEAD,
)

QWEN3 = Family(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    keys=(
        *dense_keys(
            vocab=151936,
            hidden=4096,
            ffn=22016,
            layers=32,
            heads=32,
            query_groups=32,
            head_dim=128,
            positions=32768,
            epsilon=1e-6,
            theta=10000.0,
        ),
        _QK_NORM,
    ),
    pins=(),
    signs={"qk_layernorm": True, "num_experts": False, "window_size": False, "multi_latent_attention": False},
    config={},
    config_pins={**_NO_WINDOW, "attention_bias": False},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, *QK_NORMS, OUTPUT),
    dense=(MLP_NORM, *MLP),
    after=FINAL_NORM_AND_HEAD,
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    keys=(
        *dense_keys(
            vocab=151936,
            hidden=2048,
            ffn=6144,
            layers=24,
            heads=32,
            query_groups=4,
            head_dim=None,
            positions=32768,
            epsilon=1e-6,
            theta=10000.0,
        ),
        *expert_keys(experts=128, per_token=8, ffn=768, aux_loss=0.001),
        *_MOE,
        _QK_NORM,
    ),
    pins=(),
    signs={
        "qk_layernorm": True,
        "num_experts": True,
        "window_size": False,
        "multi_latent_attention": False,
        "moe_shared_expert_intermediate_size": False,
    },
    config={"output_router_logits": False},
    config_pins={**_NO_WINDOW, "attention_bias": False},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, *QK_NORMS, OUTPUT),
    dense=(MLP_NORM, *MLP),
    moe=(MOE_NORM, ROUTER, *EXPERTS),
    after=FINAL_NORM_AND_HEAD,
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    hf_class="Qwen2MoeForCausalLM",
    keys=(
        *dense_keys(
            vocab=151936,
            hidden=2048,
            ffn=5632,
            layers=24,
            heads=16,
            query_groups=16,
            head_dim=None,
            positions=32768,
            epsilon=1e-6,
            theta=10000.0,
        ),
        *expert_keys(experts=60, per_token=4, ffn=1408, aux_loss=0.001),
        Key("shared_ffn", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=5632),
        Key("shared_gate", "", "moe_shared_expert_gate", "flag", default=True),
        *_MOE,
        _QKV_BIAS,
    ),
    pins=(),
    signs={
        "add_qkv_bias": True,
        "num_experts": True,
        "moe_shared_expert_gate": True,
        "qk_layernorm": False,
        "window_size": False,
        "multi_latent_attention": False,
    },
    config={"output_router_logits": False},
    config_pins={**_NO_WINDOW, "qkv_bias": True},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, QKV_BIAS, OUTPUT),
    dense=(MLP_NORM, *MLP),
    moe=(
        MOE_NORM,
        ROUTER,
        *EXPERTS,
        column_parallel(
            f"{_MEGATRON_SHARED}.linear_fc1.weight",
            part(f"{_HF_SHARED}.gate_proj.weight", "shared_ffn hidden"),
            part(f"{_HF_SHARED}.up_proj.weight", "shared_ffn hidden"),
        ),
        row_parallel(
            f"{_MEGATRON_SHARED}.linear_fc2.weight", part(f"{_HF_SHARED}.down_proj.weight", "hidden shared_ffn")
        ),
        replicated(f"{_MEGATRON_SHARED}.gate_weight", part(f"{HF}.mlp.shared_expert_gate.weight", "one hidden")),
    ),
    after=FINAL_NORM_AND_HEAD,
)
