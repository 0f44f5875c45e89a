"""Rows and keys that many families share. Names and shapes: docs/formats.md, "Parameter names"."""

from dataclasses import replace

from dist_convert.models.schema import (
    MOST_EXPERTS,
    MOST_LAYERS,
    Alias,
    Key,
    Part,
    Pin,
    Product,
    Row,
    column_parallel,
    norm,
    part,
    replicated,
    row_parallel,
)

#: Why what belongs to further layers is left behind.
MTP_REASON = "layers of multi-token prediction (--drop-mtp)"
MEGATRON = "decoder.layers.{layer}"
HF = "model.layers.{layer}"


def attention(name: str) -> str:
    """What Megatron calls a parameter of a layer's attention."""
    return f"{MEGATRON}.self_attention.{name}"


def hf_attention(name: str, dims: str) -> Part:
    """A Hugging Face tensor of a layer's attention."""
    return part(f"{HF}.self_attn.{name}", dims)


ATTENTION_NORM = norm(
    f"{MEGATRON}.input_layernorm.weight",
    part(f"{HF}.input_layernorm.weight", "hidden"),
    transformer_engine=attention("linear_qkv.layer_norm_weight"),
    habana=attention("linear_qkv.norm.weight"),
)
QKV = column_parallel(
    attention("linear_qkv.weight"),
    hf_attention("q_proj.weight", "query hidden"),
    hf_attention("k_proj.weight", "key_value hidden"),
    hf_attention("v_proj.weight", "key_value hidden"),
    by_query_group=True,
    habana=attention("linear_qkv.linear.weight"),
)
QKV_BIAS = column_parallel(
    attention("linear_qkv.bias"),
    hf_attention("q_proj.bias", "query"),
    hf_attention("k_proj.bias", "key_value"),
    hf_attention("v_proj.bias", "key_value"),
    by_query_group=True,
    when="qkv_bias",
)
QK_NORMS = (
    norm(attention("q_layernorm.weight"), hf_attention("q_norm.weight", "head_dim"), when="qk_norm"),
    norm(attention("k_layernorm.weight"), hf_attention("k_norm.weight", "head_dim"), when="qk_norm"),
)
OUTPUT = row_parallel(attention("linear_proj.weight"), hf_attention("o_proj.weight", "hidden query"))
_O_BIAS = hf_attention("o_proj.bias", "hidden")
OUTPUT_BIAS = replicated(attention("linear_proj.bias"), _O_BIAS, when="linear_bias")
# Llama's attention_bias covers all four projections; Megatron's add_qkv_bias only three of them.
OUTPUT_BIAS_OF_ZEROS = Row("", (_O_BIAS,), when="qkv_bias", unless="linear_bias")

_MLP_NORM = f"{MEGATRON}.pre_mlp_layernorm.weight"
_HF_MLP_NORM = part(f"{HF}.post_attention_layernorm.weight", "hidden")
MLP_NORM = norm(
    _MLP_NORM,
    _HF_MLP_NORM,
    transformer_engine=f"{MEGATRON}.mlp.linear_fc1.layer_norm_weight",
    habana=f"{MEGATRON}.mlp.linear_fc1.norm.weight",
)
#: Nothing fuses it, as the router reads it too; yet the local modules save it as if it were.
MOE_NORM = replace(norm(_MLP_NORM, _HF_MLP_NORM), local_key=MLP_NORM.transformer_engine)

MLP = (
    column_parallel(
        f"{MEGATRON}.mlp.linear_fc1.weight",
        part(f"{HF}.mlp.gate_proj.weight", "ffn hidden"),
        part(f"{HF}.mlp.up_proj.weight", "ffn hidden"),
        habana=f"{MEGATRON}.mlp.linear_fc1.linear.weight",
    ),
    column_parallel(
        f"{MEGATRON}.mlp.linear_fc1.bias",
        part(f"{HF}.mlp.gate_proj.bias", "ffn"),
        part(f"{HF}.mlp.up_proj.bias", "ffn"),
        when="linear_bias",
    ),
    row_parallel(f"{MEGATRON}.mlp.linear_fc2.weight", part(f"{HF}.mlp.down_proj.weight", "hidden ffn")),
    replicated(f"{MEGATRON}.mlp.linear_fc2.bias", part(f"{HF}.mlp.down_proj.bias", "hidden"), when="linear_bias"),
)

#: Further rows of layers without experts.
DENSE = (MLP_NORM, *MLP)

ROUTER = replicated(f"{MEGATRON}.mlp.router.weight", part(f"{HF}.mlp.gate.weight", "experts hidden"))
_EXPERT, _HF_EXPERTS = f"{MEGATRON}.mlp.experts.{{expert}}", f"{HF}.mlp.experts"
#: Of each expert in a file: rows 0..F of gate_up_proj are the gate, F..2F up.
_GATE_UP = Alias(f"{_HF_EXPERTS}.gate_up_proj", is_stacked=True, rows=("expert_ffn", "expert_ffn"))
EXPERTS = (
    column_parallel(
        f"{_EXPERT}.linear_fc1.weight",
        part(f"{_HF_EXPERTS}.{{expert}}.gate_proj.weight", "expert_ffn hidden", _GATE_UP),
        part(f"{_HF_EXPERTS}.{{expert}}.up_proj.weight", "expert_ffn hidden", replace(_GATE_UP, part=1)),
    ),
    row_parallel(
        f"{_EXPERT}.linear_fc2.weight",
        part(
            f"{_HF_EXPERTS}.{{expert}}.down_proj.weight",
            "hidden expert_ffn",
            Alias(f"{_HF_EXPERTS}.down_proj", is_stacked=True),
        ),
    ),
)

#: What is added to the experts' scores to choose them, in Megatron a buffer that is never rounded.
ROUTER_BIAS = replicated(
    f"{MEGATRON}.mlp.router.expert_bias", Part(f"{HF}.mlp.gate.e_score_correction_bias", ("experts",), dtype="F32")
)


def shared_experts(hf_name: str) -> tuple[Row, Row]:
    """Shared experts, which are cut over all tensor parallel ranks, whatever the experts are cut over."""
    megatron, hf = f"{MEGATRON}.mlp.shared_experts", f"{HF}.mlp.{hf_name}"
    gate, up = (part(f"{hf}.{name}_proj.weight", "shared_ffn hidden") for name in ("gate", "up"))
    down = part(f"{hf}.down_proj.weight", "hidden shared_ffn")
    return (
        column_parallel(f"{megatron}.linear_fc1.weight", gate, up, when="shared_ffn"),
        row_parallel(f"{megatron}.linear_fc2.weight", down, when="shared_ffn"),
    )


SHARED_EXPERTS = shared_experts("shared_experts")


def basic_keys(*of_attention: Key, epsilon: float, theta: float, tied: bool = False) -> tuple[Key, ...]:
    """The facts that all families have, and those of their attention, with the defaults of its class in transformers.

    Sizes have none: every config.json says them.
    """
    return (
        Key("vocab", "vocab_size", "vocab_size"),
        Key("hidden", "hidden_size", "hidden_size"),
        Key("ffn", "intermediate_size", "ffn_hidden_size"),
        Key("layers", "num_hidden_layers", "num_layers", most=MOST_LAYERS),
        Key("heads", "num_attention_heads", "num_attention_heads"),
        *of_attention,
        Key("max_positions", "max_position_embeddings", "max_position_embeddings"),
        Key("norm_epsilon", "rms_norm_eps", "norm_epsilon", "number", default=epsilon, arg_default=1e-5),
        Key("rope_theta", "rope_theta", "rotary_base", "number", default=theta, arg_default=10000.0),
        Key("tied", "tie_word_embeddings", "untie_embeddings_and_output_weights", "flag", tied, codec="opposite"),
    )


_SHARED_WIDTH = "moe_shared_expert_intermediate_size"


def group_keys(*, groups: int, chosen: int) -> tuple[Key, ...]:
    """Those of DeepSeek-V3's router, which chooses groups first, likewise."""
    return (
        Key("expert_groups", "n_group", "moe_router_num_groups", default=groups, codec="or_one"),
        Key("chosen_groups", "topk_group", "moe_router_group_topk", default=chosen, codec="or_one"),
    )


def routed_keys(*, experts: int, per_token: int, ffn: int, dense: int, shared: int, scale: float) -> tuple[Key, ...]:
    """Those of DeepSeek's experts: routed ones, whose weights are scaled, shared ones, and layers before them."""
    return (
        Key("expert_ffn", "moe_intermediate_size", "moe_ffn_hidden_size", default=ffn),
        Key("experts", "n_routed_experts", "num_experts", default=experts, most=MOST_EXPERTS),
        Key("experts_per_token", "num_experts_per_tok", "moe_router_topk", default=per_token, arg_default=2),
        Key("dense_layers", "first_k_dense_replace", "moe_layer_freq", default=dense, codec="leading_dense"),
        Key("router_scale", "routed_scaling_factor", "moe_router_topk_scaling_factor", "number", scale, 1.0),
        Key("shared_experts", "n_shared_experts", _SHARED_WIDTH, default=shared, codec="experts_wide"),
    )


def dense_keys(
    *, query_groups: int | None, head_dim: int | None, epsilon: float, theta: float, tied: bool = False
) -> tuple[Key, ...]:
    """Those of families with grouped queries."""
    groups = Key("query_groups", "num_key_value_heads", "num_query_groups", default=query_groups)
    width = Key("head_dim", "head_dim", "kv_channels", default=head_dim)
    return basic_keys(groups, width, epsilon=epsilon, theta=theta, tied=tied)


def router_keys(config: str, *aliases: str, experts: int, per_token: int) -> tuple[Key, ...]:
    """Those of a router, likewise; configs have different names of the number of experts."""
    return (
        Key("experts", config, "num_experts", default=experts, most=MOST_EXPERTS, aliases=aliases),
        Key("experts_per_token", "num_experts_per_tok", "moe_router_topk", default=per_token, arg_default=2),
        Key("router_aux_loss", "router_aux_loss_coef", "", "number", default=0.001),
    )


def expert_keys(*, experts: int, per_token: int, ffn: int) -> tuple[Key, ...]:
    """Those of families that name the width of an expert apart, likewise."""
    width = Key("expert_ffn", "moe_intermediate_size", "moe_ffn_hidden_size", default=ffn)
    return (width, *router_keys("num_experts", "num_local_experts", experts=experts, per_token=per_token))


QKV_BIAS_KEY = Key("qkv_bias", "", "add_qkv_bias", "flag", default=True)
QK_NORM_KEY = Key("qk_norm", "", "qk_layernorm", "flag", default=True)
#: Which layers of a Qwen have experts, and whether the chosen ones' weights are made to sum to one.
SPARSE_KEYS = (
    Key("dense_layers", "decoder_sparse_step", "moe_layer_freq", default=1, codec="sparse_steps"),
    Key("norm_topk_prob", "norm_topk_prob", "moe_router_pre_softmax", "flag", codec="opposite"),
)
NO_WINDOW = {"use_sliding_window": False}
#: DeepSeek-V3's router: sigmoids, and a bias that decides which experts are chosen.
SIGMOID_PINS = (
    Pin("moe_router_score_function", ("sigmoid",), "the family scores by the sigmoid", is_written=True),
    Pin("moe_router_enable_expert_bias", (True,), "the family's router has an expert bias", is_written=True),
)
SHARED_SIZE = Product("shared_ffn", "shared_experts", ("expert_ffn",))

#: Layers of multi-token prediction, which follow the others: docs/formats.md, "Multi-token prediction".
_PREDICTION = "mtp.layers.{mtp}"

PREDICTION = (
    norm(f"{_PREDICTION}.enorm.weight", part(f"{HF}.enorm.weight", "hidden")),
    norm(f"{_PREDICTION}.hnorm.weight", part(f"{HF}.hnorm.weight", "hidden")),
    column_parallel(f"{_PREDICTION}.eh_proj.weight", part(f"{HF}.eh_proj.weight", "hidden twice_hidden")),
    norm(f"{_PREDICTION}.final_layernorm.weight", part(f"{HF}.shared_head.norm.weight", "hidden")),
)
PREDICTION_COPIES = {
    "model.embed_tokens.weight": f"{HF}.embed_tokens.weight",
    "lm_head.weight": f"{HF}.shared_head.head.weight",
}
#: transformers' classes have one by default, also where the files have none.
MTP_KEY = Key(
    "mtp_layers", "num_nextn_predict_layers", "mtp_num_layers", default=1, codec="if_any", aliases=("num_mtp_layers",)
)
