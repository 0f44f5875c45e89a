"""gpt-oss: attention with sinks, windows in every other layer, biases everywhere, and experts with a gate of their own.

Its files have all experts of a layer in one tensor, transposed, with the columns of gate and up in turn.
"""

from dataclasses import replace

from dist_convert.models import blocks, schema

_ROUTER, _HF_ROUTER = f"{blocks.MEGATRON}.mlp.router", f"{blocks.HF}.mlp.router"
_EXPERT, _HF_EXPERTS = f"{blocks.MEGATRON}.mlp.experts.{{expert}}", f"{blocks.HF}.mlp.experts"
_DOWN = schema.Alias(f"{_HF_EXPERTS}.down_proj", is_stacked=True, is_transposed=True, is_published=True)
_GATE_UP = replace(_DOWN, name=f"{_HF_EXPERTS}.gate_up_proj", rows=("ffn", "ffn"), in_turn=True)


def _bias(alias: schema.Alias) -> schema.Alias:
    return replace(alias, name=f"{alias.name}_bias", is_transposed=False)


def _expert(name: str, dims: str, alias: schema.Alias) -> schema.Part:
    return schema.part(f"{_HF_EXPERTS}.{{expert}}.{name}", dims, alias)


GPT_OSS = schema.Family(
    name="gpt_oss",
    hf_class="GptOssForCausalLM",
    # The defaults of GptOssConfig in transformers 5.24.
    keys=(
        *blocks.dense_keys(query_groups=8, head_dim=64, epsilon=1e-5, theta=150000.0),
        *blocks.router_keys("num_local_experts", "num_experts", experts=128, per_token=4),
        schema.Key("sliding_window", "sliding_window", "window_size", default=128, codec="window"),
        schema.Key("linear_bias", "", "", "flag", default=True),
        schema.Key("qkv_bias", "", "", "flag", default=True),
    ),
    pins=(
        schema.Pin("position_embedding_type", ("yarn",), "the family scales rotary positions by YaRN", is_written=True),
        schema.Pin("add_bias_linear", (True,), "all linear layers of the family have biases", is_written=True),
        schema.Pin("swiglu", (False,), "the family's gate is a quick GELU", is_written=True),
        schema.Pin("quick_geglu", (True,), "the family's gate is a quick GELU", is_written=True),
        schema.Pin("glu_linear_offset", (1.0, 1), "the family adds 1 to the up projection", is_written=True),
        schema.Pin("activation_func_clamp_value", (7.0, 7), "the family clamps gate and up at 7", is_written=True),
        schema.Pin("softmax_type", ("learnable",), "the family has attention sinks", is_written=True),
        schema.Pin("window_attn_skip_freq", (2,), "every second layer of the family sees all tokens", is_written=True),
    ),
    required_args=("softmax_type", "window_size"),
    config={"output_router_logits": False},
    config_pins={"attention_bias": True, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    layer=(
        blocks.ATTENTION_NORM,
        blocks.QKV,
        blocks.QKV_BIAS,
        schema.column_parallel(
            blocks.attention("core_attention.softmax_offset"), blocks.hf_attention("sinks", "heads")
        ),
        blocks.OUTPUT,
        blocks.OUTPUT_BIAS,
    ),
    moe=(
        blocks.MOE_NORM,
        schema.replicated(f"{_ROUTER}.weight", schema.part(f"{_HF_ROUTER}.weight", "experts hidden")),
        schema.replicated(f"{_ROUTER}.bias", schema.part(f"{_HF_ROUTER}.bias", "experts")),
        schema.column_parallel(
            f"{_EXPERT}.linear_fc1.weight",
            _expert("gate_proj.weight", "ffn hidden", _GATE_UP),
            _expert("up_proj.weight", "ffn hidden", replace(_GATE_UP, part=1)),
        ),
        schema.column_parallel(
            f"{_EXPERT}.linear_fc1.bias",
            _expert("gate_proj.bias", "ffn", _bias(_GATE_UP)),
            _expert("up_proj.bias", "ffn", _bias(replace(_GATE_UP, part=1))),
        ),
        schema.row_parallel(f"{_EXPERT}.linear_fc2.weight", _expert("down_proj.weight", "hidden ffn", _DOWN)),
        schema.replicated(f"{_EXPERT}.linear_fc2.bias", _expert("down_proj.bias", "hidden", _bias(_DOWN))),
    ),
    special_ids=(199998, 200002),
    scalings=("yarn",),
    layer_types=("sliding_attention", "full_attention"),
)
