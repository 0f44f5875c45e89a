"""Every family: its facts survive both ways, and what would make it compute something else is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_convert.errors import ConversionError, MissingArguments, Problems, UnsupportedModel, UsageError
from dist_convert.formats.huggingface.config import architecture_from_config, config_json
from dist_convert.formats.megatron.args import architecture_from_args, in_megatrons_words
from dist_convert.formats.megatron.said import said_of
from dist_convert.formats.megatron.target_args import model_values
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import Where
from dist_convert.models.schema import LinearScaling, YarnScaling
from dist_convert.options import Options
from tests.published import PUBLISHED

DENSE: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "head_dim": 16,
    "rope_theta": 50000.0,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
SHARED = {
    "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
PLAIN_YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 32,
    "truncate": False,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LATENT = SHARED | {
    "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "rope_scaling": YARN,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": MOE | {"norm_topk_prob": False, "shared_expert_intermediate_size": 96},
    "qwen3": {},
    "qwen3_moe": MOE | {"mlp_only_layers": [0, 2]},
    "seed_oss": {},
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2},
    "deepseek_v2": LATENT | {"q_lora_rank": None, "n_group": None, "topk_group": None},
    "glm4_moe": SHARED | {"attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "phi3": {"sliding_window": 6},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 6, "rope_scaling": PLAIN_YARN},
}


def config_of(family: str, **more: Any) -> dict[str, Any]:
    named = {"model_type": family, "architectures": [FAMILIES[family].hf_class]}
    return named | DENSE | TINY[family] | more


def args_of(family: str, **more: Any) -> dict[str, Any]:
    """As they are read from a checkpoint."""
    architecture = architecture_from_config(config_of(family))
    own = {"padded_vocab_size": 512, **model_values(architecture)}
    return {**json.loads(json.dumps(own)), **more}


#: Those whose rotary frequencies may be scaled in any way that Megatron has for positions.
SCALED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "seed_oss", "smollm3")
#: A family, and keys of its config at their ends.
BOTH_WAYS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": None}),
    ("mixtral", {"sliding_window": 2}),
    ("seed_oss", {"attention_bias": False}),
    ("qwen2_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": []}),
    ("qwen3_moe", {"norm_topk_prob": False, "decoder_sparse_step": 3, "mlp_only_layers": [2]}),
    ("deepseek_v3", {"first_k_dense_replace": 0, "n_shared_experts": None, "q_lora_rank": None}),
    ("deepseek_v3", {"first_k_dense_replace": 4, "rope_scaling": None, "routed_scaling_factor": 1}),
    ("deepseek_v3", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}}),
    ("deepseek_v2", {"q_lora_rank": 24, "n_group": 1, "topk_group": 1}),
    ("glm4_moe", {"attention_bias": False, "use_qk_norm": False, "n_group": 4, "topk_group": 2}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    ("glm4_moe", {"num_nextn_predict_layers": 0}),
    ("gpt_oss", {"rope_scaling": PLAIN_YARN | {"truncate": True}}),
    *((family, {"rope_scaling": scaling}) for family in SCALED for scaling in (PLAIN_YARN, LINEAR, LLAMA3)),
    ("glm4_moe", {"rope_scaling": LINEAR}),
    ("glm4_moe", {"tie_word_embeddings": True}),
    ("glm4_moe", {"rope_scaling": LLAMA3}),
    ("deepseek_v3", {"num_nextn_predict_layers": 2}),
    ("gpt_oss", {"rope_scaling": PLAIN_YARN | {"factor": 1.0, "mscale": 0.7, "mscale_all_dim": 0.7}}),
]


@pytest.mark.parametrize(("family", "keys"), BOTH_WAYS, ids=str)
def test_a_config_that_is_written_says_what_the_config_said_that_was_read(family: str, keys: dict[str, Any]) -> None:
    architecture = architecture_from_config(config_of(family, **keys))
    assert architecture_from_config(config_json(architecture, "BF16")) == architecture


@pytest.mark.parametrize(("family", "keys"), BOTH_WAYS, ids=str)
def test_args_that_are_written_say_what_the_config_said(family: str, keys: dict[str, Any]) -> None:
    architecture = architecture_from_config(config_of(family, **keys))
    args = {"padded_vocab_size": 512, **json.loads(json.dumps(model_values(architecture)))}
    read = architecture_from_args(args, vocab=500, file="shard", family=FAMILIES[family], trusts_factor=True)
    assert replace(read, padded_vocab=500, router_aux_loss=architecture.router_aux_loss) == architecture
    assert json.loads(json.dumps(model_values(read))) == json.loads(json.dumps(model_values(architecture)))


def test_the_large_deepseek_v2_is_refused_with_the_reason_that_its_groups_are_chosen_otherwise() -> None:
    v2 = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
    experts = {"n_routed_experts": 160, "num_experts_per_tok": 6, "q_lora_rank": 1536}
    with pytest.raises(Problems) as error:
        architecture_from_config(config_of("deepseek_v2", **v2, **experts))
    assert [(one.what, one.expected, one.found) for one in error.value.problems] == [
        (
            "topk_method is not supported: DeepSeek-V2 chooses groups of experts by the best score in each, Megatron "
            "by a sum of scores",
            "topk_method=greedy",
            "group_limited_greedy",
        ),
        ("n_group is not supported", "n_group=1", "8"),
        ("topk_group is not supported", "topk_group=1", "3"),
    ]


@pytest.mark.parametrize(
    ("family", "keys", "expected"),
    [
        ("deepseek_v3", {"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor=None"),
        ("deepseek_v3", {"rope_scaling": YARN | {"truncate": False}}, "truncate=True"),
        ("deepseek_v3", {"rope_scaling": YARN | {"mscale": 0}}, "mscale 1 and mscale_all_dim 0"),
        ("deepseek_v2", {"rope_scaling": YARN | {"mscale_all_dim": 0}}, "mscale 1 and mscale_all_dim 0"),
        ("deepseek_v3", {"rope_scaling": YARN | {"factor": 0.5}}, "a factor of 1 or more"),
        ("deepseek_v3", {"rope_scaling": {**YARN, "factor": None}}, "factor"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ("deepseek_v3", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type default or yarn"),
        ("phi3", {"rope_scaling": PLAIN_YARN}, "leave it out of config.json"),
        ("phi3", {"rope_scaling": LLAMA3}, "rope_type default"),
        ("phi3", {"rope_scaling": LINEAR}, "rope_type default"),
        ("deepseek_v3", {"rope_scaling": LINEAR}, "rope_type default or yarn"),
        ("gpt_oss", {"rope_scaling": LINEAR}, "rope_type yarn"),
        ("llama", {"rope_scaling": LINEAR | {"factor": 0.5}}, "a number of at least 1"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=True"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method=noaux_tc"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func=sigmoid"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=True"),
        ("deepseek_v3", {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}, "two experts or more"),
        ("glm4_moe", {"num_experts_per_tok": 1}, "two experts or more"),
        ("deepseek_v3", {"num_key_value_heads": 4}, "8 groups"),
        ("deepseek_v3", {"num_experts_per_tok": 8}, "4 experts for each token"),
        ("deepseek_v2", {"n_group": 4}, "n_group=1"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func=softmax"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding_attention in all"),
        ("mixtral", {"layer_types": ["sliding_attention"] * 4}, "full_attention in all"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=False"),
        ("glm4_moe", {"partial_rotary_factor": 1.0}, "partial_rotary_factor=0.5"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "0 or 1 for each layer"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "0 or 1 for each layer"),
        ("smollm3", {"attention_bias": True}, "attention_bias=False"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "in turn in layer_types"),
        ("gpt_oss", {"sliding_window": None}, "no layer has a window"),
        ("glm4_moe", {"rope_scaling": PLAIN_YARN}, "rope_type default or llama3 or linear"),
        ("qwen3", {"rope_scaling": PLAIN_YARN | {"attention_factor": 1.0}}, "attention_factor=None"),
        ("gpt_oss", {"rope_scaling": None}, "rope_type yarn"),
        ("gpt_oss", {"attention_bias": False}, "attention_bias=True"),
        ("gpt_oss", {"swiglu_limit": 6.0}, "swiglu_limit=7.0"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.702"),
    ],
)
def test_a_config_is_refused_that_megatron_would_compute_otherwise(
    family: str, keys: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConversionError) as error:
        architecture_from_config(config_of(family, **keys))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("deepseek_v3", "rope_type", "rope"),  # with a factor and an mscale_all_dim that scale attention
        ("deepseek_v3", "rope_type", "linear"),
        ("deepseek_v3", "rotary_scaling_factor", 0.5),
        ("deepseek_v3", "mscale", 0.0),
        ("deepseek_v3", "moe_router_topk", 1),
        ("deepseek_v3", "moe_router_load_balancing_type", "quantile_balancing"),
        ("mixtral", "moe_router_load_balancing_type", ["sinkhorn"]),
        ("qwen3_moe", "moe_latent_size", 32),
        ("qwen3_moe", "moe_router_force_load_balancing", True),
        ("qwen3_moe", "moe_router_force_biased", 1.0),
        ("qwen3_moe", "moe_router_topk_limited_devices", 2),
        ("qwen2_moe", "moe_shared_expert_glu_interleave_size", 32),
        ("qwen3_moe", "moe_expert_capacity_factor", 1.25),
        ("qwen3_moe", "moe_expert_rank_capacity_factor", 1.5),
        ("qwen3_moe", "moe_token_dropping", True),
        ("deepseek_v3", "mtp_use_repeated_layer", True),
        ("deepseek_v3", "mtp_hybrid_override_pattern", "*E"),
        ("llama", "spec", ["my_models.specs", "layer_spec"]),
        ("llama", "squared_relu", True),
        ("gpt_oss", "squared_relu", True),
        ("llama", "heterogeneous_block_specs", True),
        ("llama", "rotary_seq_len_interpolation_factor", 4),  # which some versions ignore
        ("phi3", "use_rope_scaling", True),
        ("phi3", "position_embedding_type", "yarn"),
        ("llama", "experimental_attention_variant", "dsa"),
        ("llama", "linear_attention_freq", 4),
        ("llama", "hybrid_override_pattern", "M*M*"),
        ("llama", "rope_scaling_type", "llama3"),
        ("llama", "scale_emb", 12.0),
        ("llama", "scale_depth", 1.4),
        ("llama", "dim_model_base", 256.0),
        ("llama", "output_logit_softcapping", 30.0),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama", "noop_layers", "3"),
        ("glm4_moe", "partial_rotary_factor", 1.0),
        ("smollm3", "no_rope_freq", 3),
        ("smollm3", "no_rope_freq", [0, 0, 1]),
        ("gpt_oss", "softmax_type", "off-by-one"),
        ("gpt_oss", "window_attn_skip_freq", 3),
        ("gpt_oss", "window_attn_skip_freq", [0, 1, 0, 1]),
        ("gpt_oss", "glu_linear_offset", 0.0),
        ("gpt_oss", "activation_func_clamp_value", None),
        ("gpt_oss", "position_embedding_type", "rope"),
        ("gpt_oss", "yarn_rotary_scaling_factor", None),
        ("gpt_oss", "yarn_mscale", 0.0),
        ("llama", "position_embedding_type", "yarn"),  # without its numbers
        ("glm4_moe", "position_embedding_type", "yarn"),
        ("deepseek_v3", "position_embedding_type", "yarn"),
        ("gpt_oss", "add_bias_linear", False),
    ],
)
def test_args_are_refused_that_transformers_would_compute_otherwise(family: str, name: str, value: Any) -> None:
    with pytest.raises(ConversionError):
        architecture_from_args(args_of(family, **{name: value}), vocab=500, file="shard", family=FAMILIES[family])


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("deepseek_v3", "mscale_all_dim", 0.707),
        ("deepseek_v3", "partial_rotary_factor", None),
        ("glm4_moe", "partial_rotary_factor", 0.5),
        ("llama", "rope_scaling", False),  # Megatron-Bridge's flag
        ("llama", "rope_scaling", {"rope_type": "default"}),
        ("llama", "embedding_multiplier_scale", 1.0),
        ("llama", "spec", ["local"]),
        ("llama", "spec", None),
        ("llama", "moe_expert_capacity_factor", 1.0),  # without experts
        ("qwen3_moe", "moe_expert_capacity_factor", -1.0),
        ("qwen3_moe", "moe_token_drop_policy", "position"),  # of which there is none
        ("llama", "cla_share_factor", 1),
        ("qwen3_moe", "moe_router_load_balancing_type", ["aux_loss", "seq_aux_loss"]),
        ("gpt_oss", "yarn_mscale", None),
    ],
)
def test_args_that_change_nothing_are_no_obstacle(family: str, name: str, value: Any) -> None:
    args = args_of(family)
    read = architecture_from_args({**args, name: value}, vocab=500, file="shard", family=FAMILIES[family])
    assert read == architecture_from_args(args, vocab=500, file="shard", family=FAMILIES[family])


def test_what_scales_attention_is_written_as_a_pair_or_not_at_all() -> None:
    # transformers takes neither where one is missing.
    for scaling, expected in [({}, {}), ({"mscale": 1.0, "mscale_all_dim": 1.0},) * 2]:
        architecture = architecture_from_config(config_of("gpt_oss", rope_scaling=PLAIN_YARN | scaling))
        assert config_json(architecture, "BF16")["rope_scaling"] == PLAIN_YARN | expected


def test_numbers_of_yarn_that_are_not_there_are_asked_for() -> None:
    args = args_of("gpt_oss")
    del args["yarn_rotary_scaling_factor"], args["yarn_correction_range_round_to_int"]
    with pytest.raises(MissingArguments, match="yarn_rotary_scaling_factor and yarn_correction_range_round_to_int"):
        architecture_from_args(args, vocab=500, file="shard")


def test_groups_of_experts_without_a_number_of_chosen_ones_are_refused() -> None:
    args = args_of("deepseek_v3", moe_router_topk=2, moe_router_group_topk=None)
    with pytest.raises(MissingArguments, match="moe_router_group_topk"):
        architecture_from_args(args, vocab=500, file="shard")


def test_a_factor_of_llama_is_refused_for_a_model_with_yarn() -> None:
    where = Where(Path("in"), Options("huggingface", rope_scaling_factor=8.0))
    with pytest.raises(UsageError, match="this model has another kind"):
        said_of(where, args_of("deepseek_v3"), "shard")


def test_a_factor_is_refused_where_a_model_like_this_one_has_no_scaling() -> None:
    where = Where(Path("in"), Options("huggingface", rope_scaling_factor=8.0), like=config_of("llama"))
    with pytest.raises(UsageError, match="this model has another kind"):
        said_of(where, args_of("llama"), "shard")


def test_linear_scaling_is_told_by_a_model_like_this_one() -> None:
    args = args_of("llama", rotary_seq_len_interpolation_factor=4)
    for like, expected in [({"rope_scaling": LINEAR}, LinearScaling(4.0)), ({}, None)]:
        said = said_of(Where(Path("in"), like=config_of("llama", **like)), args, "shard")
        assert said.architecture(vocab=500, file="shard").rope_scaling == expected


def test_two_scalings_of_rotary_frequencies_at_once_are_refused() -> None:
    args = args_of("llama", rotary_seq_len_interpolation_factor=4)
    said = said_of(Where(Path("in"), Options("huggingface", rope_scaling_factor=8.0)), args, "shard")
    with pytest.raises(UnsupportedModel, match="rotary-seq-len-interpolation-factor"):
        said.architecture(vocab=500, file="shard")


def test_yarn_in_the_args_of_a_model_like_one_without_is_left_out_with_a_warning() -> None:
    args = args_of("llama", **model_values(architecture_from_config(config_of("llama", rope_scaling=PLAIN_YARN))))
    said = said_of(Where(Path("in"), like=config_of("llama")), args, "shard")
    assert said.architecture(vocab=500, file="shard").rope_scaling is None
    assert "warning: position_embedding_type is 'yarn' in the args, 'rope' is used, as you say" in said.notes


def test_positions_that_are_not_rotary_are_refused_whatever_model_it_is_like() -> None:
    args = args_of("llama", position_embedding_type="learned_absolute")
    with pytest.raises(UnsupportedModel, match="position-embedding-type"):
        said_of(Where(Path("in"), like=config_of("llama")), args, "shard")


@pytest.mark.parametrize(("rounded", "expected"), [(None, True), (False, False)])
def test_yarn_in_the_arguments_of_core_0_19_is_read(rounded: bool | None, expected: bool) -> None:
    own = {
        "position_embedding_type": "yarn", "rotary_scaling_factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0,
        "yarn_original_max_position_embeddings": 32, "yarn_beta_fast": None, "yarn_beta_slow": None,
        "yarn_correction_range_round_to_int": rounded,
    }  # fmt: skip
    args = in_megatrons_words(args_of("llama", **own))
    read = architecture_from_args(args, vocab=500, file="shard")
    assert read.rope_scaling == YarnScaling(4.0, 32.0, 1.0, 32, 1.0, 0.0, truncate=expected)


def test_a_factor_below_1_is_refused() -> None:
    said = said_of(Where(Path("in"), Options("huggingface", rope_scaling_factor=0.5)), args_of("llama"), "shard")
    with pytest.raises(UnsupportedModel, match="the scaling of rotary frequencies is none"):
        said.architecture(vocab=500, file="shard")


def test_a_model_like_this_one_corrects_all_numbers_of_yarn_with_a_warning_each() -> None:
    lost = args_of("deepseek_v3", rope_type="rope", rotary_scaling_factor=1.0, mscale=1.0, mscale_all_dim=0.0)
    said = said_of(Where(Path("in"), like=config_of("deepseek_v3")), lost, "shard")
    scaling = said.architecture(vocab=500, file="shard").rope_scaling
    assert scaling == YarnScaling(40.0, 32, 1, 4096, 0.707, 0.707)
    assert "warning: rotary_scaling_factor is 1.0 in the args, 40.0 is used, as you say" in said.notes


@pytest.mark.parametrize("keys", [{"num_hidden_layers": 3}, {"routed_scaling_factor": 1.0}], ids=str)
def test_a_model_that_is_not_like_this_one_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="--like is not the checkpoint's model"):
        said_of(Where(Path("in"), like=config_of("deepseek_v3", **keys)), args_of("deepseek_v3"), "shard")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "four norms"),
        ({"model_type": "qwen2_5_vl", "vision_config": {"depth": 32}}, "vision tower"),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}, "vision_config": {}}, "vision tower"),
    ],
)
def test_a_model_that_is_none_of_the_families_is_refused_with_the_reason(config: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why) as raised:
        architecture_from_config(config)
    assert "dist-convert models lists all" in str(raised.value)


@pytest.mark.parametrize(
    ("rope", "more", "why"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
         {"original_max_position_embeddings": 64}, "given twice and disagree"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale_all_dim": 0.7}, {},
         "mscale_all_dim without mscale"),
    ],
)  # fmt: skip
def test_rotary_scaling_that_transformers_reads_otherwise_is_refused(
    rope: dict[str, Any], more: dict[str, Any], why: str
) -> None:
    config = PUBLISHED["qwen3-8b"] | {"rope_parameters": {"rope_theta": 1000000.0, **rope}, **more}
    with pytest.raises(UnsupportedModel, match=why):
        architecture_from_config(config)
