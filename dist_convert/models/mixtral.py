"""Mixtral: Llama's attention, then a router and gated experts."""

from dist_convert.models.llama import (
    ATTENTION_NORM,
    EMBEDDING,
    FINAL_NORM_AND_HEAD,
    HF,
    MEGATRON,
    MLP_NORM,
    OUTPUT,
    QKV,
)
from dist_convert.models.schema import Family, column_parallel, part, replicated, row_parallel

_MOE = f"{HF}.block_sparse_moe"
_EXPERT = f"{_MOE}.experts.{{expert}}"

EXPERTS = (
    replicated(f"{MEGATRON}.mlp.router.weight", part(f"{_MOE}.gate.weight", "experts hidden")),
    column_parallel(
        f"{MEGATRON}.mlp.experts.{{expert}}.linear_fc1.weight",
        part(f"{_EXPERT}.w1.weight", "ffn hidden"),  # gate
        part(f"{_EXPERT}.w3.weight", "ffn hidden"),  # up
    ),
    row_parallel(
        f"{MEGATRON}.mlp.experts.{{expert}}.linear_fc2.weight",
        part(f"{_EXPERT}.w2.weight", "hidden ffn"),  # down
    ),
)

MIXTRAL = Family(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, OUTPUT, MLP_NORM, *EXPERTS),
    after=FINAL_NORM_AND_HEAD,
)
