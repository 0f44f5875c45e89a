"""Mixtral: Llama's attention, then a router and gated experts."""

from dist_convert.models.llama import (
    ATTENTION_NORM,
    COMMON_PINS,
    EMBEDDING,
    FINAL_NORM_AND_HEAD,
    HF,
    MEGATRON,
    MLP_NORM,
    OUTPUT,
    QKV,
)
from dist_convert.models.schema import (
    MOST_EXPERTS,
    MOST_LAYERS,
    Family,
    Key,
    Pin,
    column_parallel,
    part,
    replicated,
    row_parallel,
)

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

#: With the defaults of MixtralConfig, alike in transformers 4.49 and 5.23. Biases are none of its config's.
_KEYS = (
    Key("vocab", "vocab_size", "vocab_size", default=32000),
    Key("hidden", "hidden_size", "hidden_size", default=4096),
    Key("ffn", "intermediate_size", "ffn_hidden_size", default=14336),
    Key("layers", "num_hidden_layers", "num_layers", default=32, most=MOST_LAYERS),
    Key("heads", "num_attention_heads", "num_attention_heads", default=32),
    Key("query_groups", "num_key_value_heads", "num_query_groups", default=8),
    Key("head_dim", "head_dim", "kv_channels"),
    Key("max_positions", "max_position_embeddings", "max_position_embeddings", default=131072),
    Key("norm_epsilon", "rms_norm_eps", "norm_epsilon", "number", default=1e-5, arg_default=1e-5),
    Key("rope_theta", "rope_theta", "rotary_base", "number", default=1000000.0, arg_default=10000.0),
    Key("tied", "tie_word_embeddings", "untie_embeddings_and_output_weights", "flag", is_opposite=True),
    Key("experts", "num_local_experts", "num_experts", default=8, most=MOST_EXPERTS),
    Key("experts_per_token", "num_experts_per_tok", "moe_router_topk", default=2, arg_default=2),
    Key("router_aux_loss", "router_aux_loss_coef", "", "number", default=0.001),
    Key("sliding_window", "sliding_window"),
    Key("qkv_bias", "", "add_qkv_bias", "flag"),
    Key("linear_bias", "", "add_bias_linear", "flag"),
)

_PINS = (
    Pin(
        "moe_router_pre_softmax",
        (False, None),
        "MixtralForCausalLM normalises the weights of the chosen experts",
        is_written=True,
    ),
    Pin("moe_router_score_function", ("softmax", None), "MixtralForCausalLM scores by softmax", is_written=True),
    Pin(
        "moe_router_topk_scaling_factor",
        (None, 1, 1.0),
        "MixtralForCausalLM does not scale expert weights",
        is_written=True,
    ),
    Pin("moe_router_num_groups", (None, 1), "MixtralForCausalLM does not group experts"),
    Pin("moe_layer_freq", (1, None), "every layer of Mixtral has experts", is_written=True),
    Pin("moe_shared_expert_intermediate_size", (None, 0), "Mixtral has no shared experts", is_written=True),
    Pin("moe_router_enable_expert_bias", (False, None), "Mixtral's router has no expert bias", is_written=True),
    Pin("moe_mlp_glu_interleave_size", (None,), "gate and up rows alternate in blocks"),
    Pin("moe_apply_probs_on_input", (False, None), "MixtralForCausalLM weighs the experts' outputs"),
)

MIXTRAL = Family(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    keys=_KEYS,
    pins=(*COMMON_PINS, *_PINS),
    config={"router_jitter_noise": 0.0, "output_router_logits": False},
    before=EMBEDDING,
    layer=(ATTENTION_NORM, QKV, OUTPUT, MLP_NORM, *EXPERTS),
    after=FINAL_NORM_AND_HEAD,
)
