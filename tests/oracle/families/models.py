"""Tiny models of every family that people train, as their config.json says them; nothing of dist_convert is used.

Those of families that are not converted stay here: one that is to be supported, or refused by name, has its model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TinyModel:
    """One model.

    Attributes:
        name: of the model, and of its directory.
        model_type: transformers' name of its family.
        config: arguments of its class of configs.
        tolerance: of logits, where both sides compute a little differently with the same weights.
        mtp_layers: of multi-token prediction, which transformers has no class for.
        layout: of two pipeline stages; "" is even.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(compare=False)  # a name has one
    tolerance: float = 1e-5
    mtp_layers: int = 0
    layout: str = ""

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts."""
        return any("experts" in key for key in self.config)


def _rope(theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | more}


_DENSE = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "initializer_range": 0.05,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_LLAMA_3_2 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
_MIXTRAL = _DENSE | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
_QWEN2_MOE = _DENSE | _MOE | {
    "norm_topk_prob": False, "shared_expert_intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
_QWEN3_MOE = _DENSE | _rope(1e6) | _MOE | {"head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}
_ROUTED = {
    "n_routed_experts": 8, "moe_intermediate_size": 48, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
_LATENT = _DENSE | _ROUTED | {
    "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
}  # fmt: skip
_NO_GROUPS = {"n_group": 1, "topk_group": 1}
_GLM45 = _DENSE | _rope(1e6, partial_rotary_factor=0.5) | _ROUTED | _NO_GROUPS | {
    "head_dim": 16, "attention_bias": True, "use_qk_norm": True, "num_experts_per_tok": 2,
}  # fmt: skip
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "tie_word_embeddings": True}

MODELS: tuple[TinyModel, ...] = (
    TinyModel("llama", "llama", _DENSE | _rope()),
    TinyModel("llama32", "llama", _DENSE | {
        "tie_word_embeddings": True, "head_dim": 16, "max_position_embeddings": 131072, "rope_parameters": _LLAMA_3_2,
    }),
    TinyModel("qwen2", "qwen2", _DENSE | _rope(1e6)),
    TinyModel("qwen2-tied", "qwen2", _DENSE | _rope(1e6) | {"tie_word_embeddings": True}),
    TinyModel("mistral", "mistral", _DENSE | _rope(1e6, **_LINEAR) | {"head_dim": 16, "sliding_window": None}),
    TinyModel("mistral-window", "mistral", _DENSE | _rope() | {"head_dim": 8, "sliding_window": 6}),
    TinyModel("qwen3", "qwen3", _DENSE | _rope(1e6) | {"head_dim": 16}),
    TinyModel("qwen3-yarn", "qwen3", _DENSE | {"head_dim": 16, "rope_parameters": _YARN}),
    TinyModel("qwen3-tied", "qwen3", _DENSE | _rope(1e6) | {"head_dim": 16, "tie_word_embeddings": True}),
    TinyModel("mixtral", "mixtral", _MIXTRAL | _rope(1e6)),
    # transformers 5 finds no width of heads for YaRN where the config says none.
    TinyModel("mixtral-yarn", "mixtral", _MIXTRAL | {"head_dim": 8, "rope_parameters": _YARN}),
    TinyModel("qwen3-moe", "qwen3_moe", _QWEN3_MOE),
    TinyModel("qwen3-moe-mixed", "qwen3_moe", _QWEN3_MOE | {"mlp_only_layers": [0, 2]}),
    TinyModel("qwen2-moe", "qwen2_moe", _QWEN2_MOE | _rope(1e6)),
    TinyModel("qwen2-moe-yarn", "qwen2_moe", _QWEN2_MOE | {"rope_parameters": _YARN}),
    TinyModel("deepseek-v3", "deepseek_v3", _LATENT | _rope()),
    TinyModel("deepseek-v3-mtp", "deepseek_v3", _LATENT | _rope(), mtp_layers=1),
    TinyModel("deepseek-v3-yarn", "deepseek_v3", _LATENT | {
        "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    }),
    # Inside of its attention transformers normalises with an epsilon of 1e-6, Megatron with the model's.
    TinyModel("moonlight", "deepseek_v3", _LATENT | _rope(50000.0) | _NO_GROUPS | {
        "rms_norm_eps": 1e-5, "q_lora_rank": None, "n_shared_experts": 2,
    }, tolerance=1e-4),
    TinyModel("deepseek-v2-lite", "deepseek_v2", _LATENT | _NO_GROUPS | {
        "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "q_lora_rank": None,
        "topk_method": "greedy", "n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    }),
    TinyModel("deepseek-v2", "deepseek_v2", _LATENT | _rope() | {
        "topk_method": "group_limited_greedy", "norm_topk_prob": False, "routed_scaling_factor": 16.0,
    }),
    TinyModel("glm45", "glm4_moe", _GLM45 | _rope(1e6, partial_rotary_factor=0.5, **_LINEAR)),
    TinyModel("glm45-mtp", "glm4_moe", _GLM45, mtp_layers=1, layout="Ettt|tmL"),
    TinyModel("glm45-two-mtp", "glm4_moe", _GLM45, mtp_layers=2, layout="Ettttmm|L"),
    TinyModel("glm45-tied-mtp", "glm4_moe", _GLM45 | {"tie_word_embeddings": True}, mtp_layers=1),
    TinyModel("gpt-oss", "gpt_oss", _DENSE | {
        "intermediate_size": 48, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2,
        "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": True,
        "rope_parameters": _YARN | {"rope_theta": 150000.0, "truncate": False},
    }),
    TinyModel("phi3", "phi3", _DENSE | _rope() | {"sliding_window": None, "pad_token_id": 0}),
    TinyModel("granite", "granite", _DENSE | _rope() | {
        "embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    }),
    TinyModel("olmo2", "olmo2", _DENSE | _rope(500000.0)),
    TinyModel("gemma2", "gemma2", _DENSE | _rope() | _GEMMA),
    TinyModel("gemma3", "gemma3_text", _DENSE | _GEMMA),
    TinyModel("seed-oss", "seed_oss", _DENSE | _rope(1e7, **_LINEAR) | {
        "head_dim": 16, "attention_bias": True, "attention_out_bias": False,
    }),
    TinyModel("smollm3", "smollm3", _DENSE | {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    TinyModel("olmoe", "olmoe", _DENSE | _rope() | _MOE | {
        "intermediate_size": 48, "num_key_value_heads": 8, "norm_topk_prob": False,
    }),
)  # fmt: skip
