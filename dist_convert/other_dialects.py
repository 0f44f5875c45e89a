"""Names of Megatron parameters that no table has, and how a file's spelling is described to people."""

from __future__ import annotations

from collections.abc import Iterable

from dist_convert.dialects import has_fused_norm

#: Parameters that exist in Megatron and have no place in any family here: part of the name -> what it is.
_HOMELESS = (
    (".q_layernorm.", "query layernorm (--qk-layernorm)"),
    (".k_layernorm.", "key layernorm (--qk-layernorm)"),
    (".shared_experts.", "shared experts (--moe-shared-expert-intermediate-size)"),
    (".router.expert_bias", "the router's expert bias (--moe-router-enable-expert-bias)"),
    (".router.bias", "the router's bias"),
    ("mtp.", "multi-token prediction (--mtp-num-layers)"),
    ("embedding.position_embeddings.", "learned position embeddings"),
    (".experts.dynamic_mlp.", "FP8 dynamic experts (IntelFP8DynamicMLP)"),
    ("layernorm.bias", "a LayerNorm bias"),
    ("layer_norm_bias", "a LayerNorm bias"),
    (".bias", "a bias"),
)


def describe_homeless(name: str) -> str:
    """What a parameter is for which no table has a row."""
    return next((what for part, what in _HOMELESS if part in f"{name}"), "a parameter that no table names")


def describe_dialect(names: Iterable[str]) -> str:
    """How a file spells its norms and experts, for people."""
    listed = list(names)
    fused = any(map(has_fused_norm, listed))
    marks = (
        (".experts.local_experts.", "sequential"),
        (".experts.local_expert_", "habana-dynamic"),
        (".experts.weight1", "grouped"),
        (".experts.linear_fc1.weight", "te-grouped"),
    )
    experts = [what for mark, what in marks if any(mark in name for name in listed)]
    norms = "transformer_engine norms" if fused else "local norms"
    return ", ".join([norms, *(f"{what} experts" for what in experts)])
