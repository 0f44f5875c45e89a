"""The training arguments inside a checkpoint: which are needed, which are refused, and what is kept of them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert.errors import MissingArguments, Problems, UnsupportedModel
from dist_convert.formats.megatron.args import architecture_from_args
from dist_convert.models import FAMILIES
from tests.checkpoints import Grid, Model, hf_tensors, make, megatron_shards, save, training_args
from tests.converting import assert_same, convert, read_tensors

LLAMA, MIXTRAL = Model(layers=1), Model(layers=1, experts=2)

#: What neither family can express.
REFUSED: list[tuple[str, Any]] = [
    ("position_embedding_type", "learned_absolute"),
    ("position_embedding_type", "yarn"),
    ("position_embedding_type", "none"),
    ("rotary_percent", 0.5),
    ("rotary_interleaved", True),
    ("rotary_seq_len_interpolation_factor", 4),
    ("normalization", "LayerNorm"),
    ("swiglu", False),
    ("mtp_num_layers", 1),
    ("qk_l2_norm", True),
    ("no_rope_freq", [0, 1]),
    ("attention_output_gate", True),
    ("softmax_type", "off-by-one"),
    ("apply_residual_connection_post_layernorm", True),
    ("apply_norm_post_sub_block", True),
    ("heterogeneous_layers_config_path", "/layers.json"),
    ("use_mup", True),
    ("gtp_weight_remat_size", 2),
]
REFUSED_OF_EXPERTS: list[tuple[str, Any]] = [
    ("moe_router_pre_softmax", True),
    ("moe_router_score_function", "sigmoid"),
    ("moe_router_load_balancing_type", "sinkhorn"),
    ("moe_router_topk_scaling_factor", 2.5),
    ("moe_router_num_groups", 2),
    ("moe_layer_freq", [0, 1]),
    ("moe_layer_freq", 2),
    ("moe_shared_expert_intermediate_size", 24),
    ("moe_mlp_glu_interleave_size", 4),
    ("moe_apply_probs_on_input", True),
    ("add_bias_linear", True),
]
#: What training leaves in the args of a plain Llama or Mixtral, one version or another.
HARMLESS: list[tuple[str, Any]] = [
    ("multi_latent_attention", False),
    ("mtp_num_layers", None),
    ("no_rope_freq", None),
    ("rotary_seq_len_interpolation_factor", None),
    ("moe_layer_freq", 1),
    ("moe_router_score_function", "softmax"),
    ("moe_router_load_balancing_type", "aux_loss"),
    ("moe_shared_expert_intermediate_size", None),
    ("window_size", None),
    ("softmax_type", "vanilla"),
    ("apply_layernorm_1p", False),
    ("rope_scaling_factor", 8.0),
]


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        *((LLAMA, *pair) for pair in [*REFUSED, ("multi_latent_attention", True)]),
        *((MIXTRAL, *pair) for pair in [*REFUSED, *REFUSED_OF_EXPERTS]),
    ],
    ids=lambda value: ("mixtral" if value.experts else "llama") if isinstance(value, Model) else str(value),
)
def test_an_argument_without_a_place_in_the_family_is_refused_by_name(
    model: Model, name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", model, **{name: value})
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert name in err.replace("-", "_")
    assert "mp_rank_00/model_optim_rng.pt" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), HARMLESS, ids=str)
def test_an_argument_at_the_value_of_a_plain_model_is_no_obstacle(name: str, value: Any, tmp_path: Path) -> None:
    make(tmp_path / "in", MIXTRAL, **{name: value})
    assert convert(tmp_path / "in", tmp_path / "out") == 0


def test_all_refused_arguments_are_reported_together() -> None:
    args = vars(training_args(LLAMA, normalization="LayerNorm", swiglu=False, num_layers=None))
    with pytest.raises(Problems) as caught:
        architecture_from_args(args, vocab=None, file="shard")
    assert [type(problem) for problem in caught.value.problems] == [
        UnsupportedModel,
        UnsupportedModel,
        MissingArguments,
    ]


@pytest.mark.parametrize(
    ("args", "name", "hf_class"),
    [
        ({}, "llama", "LlamaForCausalLM"),
        ({"window_size": (-1, 0)}, "llama", "LlamaForCausalLM"),
        ({"window_size": (4095, 0)}, "mistral", "MistralForCausalLM"),
        ({"add_qkv_bias": True}, "qwen2", "Qwen2ForCausalLM"),
        ({"add_qkv_bias": True, "add_bias_linear": True}, "llama", "LlamaForCausalLM"),
        ({"qk_layernorm": True}, "qwen3", "Qwen3ForCausalLM"),
        ({"num_experts": 4}, "mixtral", "MixtralForCausalLM"),
        ({"num_experts": 4, "qk_layernorm": True}, "qwen3_moe", "Qwen3MoeForCausalLM"),
        (
            {"num_experts": 4, "add_qkv_bias": True, "moe_shared_expert_gate": True,
             "moe_shared_expert_intermediate_size": 48},
            "qwen2_moe", "Qwen2MoeForCausalLM",
        ),
        (
            {"num_experts": 4, "rotary_percent": 0.5, "moe_router_enable_expert_bias": True,
             "moe_router_score_function": "sigmoid"},
            "glm4_moe", "Glm4MoeForCausalLM",
        ),
        (
            {"num_experts": 4, "multi_latent_attention": True, "moe_router_enable_expert_bias": True,
             "moe_router_score_function": "sigmoid", "qk_layernorm": True, "rope_type": "rope",
             "num_query_groups": 4},
            "deepseek_v3", "DeepseekV3ForCausalLM",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_family_follows_from_the_arguments(args: dict[str, Any], name: str, hf_class: str) -> None:
    said = json.loads(json.dumps(vars(training_args(LLAMA)) | args, default=str))
    found = architecture_from_args(said, vocab=None, file="shard")
    assert (found.family, FAMILIES[found.family].hf_class) == (name, hf_class)


@pytest.mark.parametrize(("sign", "family"), [("add_qkv_bias", "qwen2"), ("qk_layernorm", "qwen3")])
def test_a_window_that_no_family_with_the_other_arguments_has_is_refused_and_not_dropped(
    sign: str, family: str
) -> None:
    said = json.loads(json.dumps(vars(training_args(LLAMA)) | {sign: True, "window_size": [4095, 0]}, default=str))
    with pytest.raises(UnsupportedModel, match="--window-size has a value that the target cannot express") as caught:
        architecture_from_args(said, vocab=None, file="shard")
    assert (caught.value.found, caught.value.remedy) == ("[4095, 0]", f"no {family} has it")
    del said["window_size"]
    assert architecture_from_args(said, vocab=None, file="shard").family == family


@pytest.mark.parametrize(("flag", "factor"), [("32", 32.0), ("8", 8.0)])
def test_a_rope_factor_that_training_may_have_ignored_is_refused_until_the_user_says_which_it_was(
    flag: str, factor: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LLAMA, use_rope_scaling=True, rope_scaling_factor=32.0)
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert "give the factor of that version: --rope-scaling-factor 32, or 8" in capsys.readouterr().err
    assert convert(tmp_path / "in", tmp_path / "out", "--rope-scaling-factor", flag) == 0
    scaling = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", factor)
    warned = "warning: rope_scaling_factor is 32.0 in the args, 8.0 is used, as you say" in capsys.readouterr().err
    assert warned is (factor == 8.0)


def test_a_rope_theta_that_an_importer_lost_is_taken_from_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LLAMA, rotary_base=10000)
    assert convert(tmp_path / "in", tmp_path / "out", "--rope-theta", "500000") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 500000.0
    assert "warning: rotary_base is 10000 in the args, 500000.0 is used, as you say" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"])
def test_an_absent_argument_that_decides_the_model_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = training_args(LLAMA)
    delattr(args, name)
    save(tmp_path / "in", megatron_shards(LLAMA, hf_tensors(LLAMA)), args)
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert f"the checkpoint's args lack {name}\n" in capsys.readouterr().err


def test_a_checkpoint_without_args_is_refused_with_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in", megatron_shards(LLAMA, hf_tensors(LLAMA)), None)
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert err.startswith("the checkpoint has no args\n")
    assert "/mp_rank_00/model_optim_rng.pt\n" in err
    assert "expected: an argparse.Namespace or a dict under the key 'args'\n" in err
    assert "found:    checkpoint_version: float, iteration: int, model: dict\n" in err
    assert "remedy:   " in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "absent",
    [
        ("ffn_hidden_size",),
        ("num_query_groups", "group_query_attention"),
        ("group_query_attention",),
        ("kv_channels",),
        ("ffn_hidden_size", "kv_channels", "num_query_groups", "group_query_attention"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "model",
    [Model(groups=4), Model(groups=1), Model(head_dim=8)],
    ids=str,
)
def test_absent_sizes_are_those_of_the_tensors(absent: tuple[str, ...], model: Model, tmp_path: Path) -> None:
    grid = Grid(tp=2 if model.groups > 1 else 1)
    args = training_args(model, grid)
    for name in absent:
        delattr(args, name)
    expected = hf_tensors(model)
    save(tmp_path / "in", megatron_shards(model, expected, grid), args)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert_same(read_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("wrong", "tensor"),
    [
        ({"ffn_hidden_size": 32}, "mlp.linear_fc1.weight"),
        ({"num_query_groups": 1}, "self_attention.linear_qkv.weight"),
        ({"kv_channels": 8}, "self_attention.linear_qkv.weight"),
    ],
    ids=str,
)
def test_sizes_that_contradict_the_tensors_are_an_error(
    wrong: dict[str, int], tensor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in", megatron_shards(LLAMA, hf_tensors(LLAMA)), training_args(LLAMA, **wrong))
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    assert f"wrong shape for decoder.layers.0.{tensor}\n" in capsys.readouterr().err


def test_arguments_of_older_versions_may_be_absent(tmp_path: Path) -> None:
    args = training_args(LLAMA)
    for name in (
        "position_embedding_type", "rotary_percent", "rotary_interleaved", "use_rope_scaling", "add_qkv_bias",
        "virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
        "num_experts", "moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size", "tokenizer_model",
        "params_dtype", "padded_vocab_size", "kv_channels",
    ):  # fmt: skip
        delattr(args, name)
    save(tmp_path / "in", megatron_shards(LLAMA, hf_tensors(LLAMA)), args)
    assert convert(tmp_path / "in", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("said", "model", "args", "decided"),
    [
        ("mixtral", LLAMA, {}, "llama without rope scaling"),
        ("llama3.1", LLAMA, {}, "llama without rope scaling"),
        ("llama2", LLAMA, {"use_rope_scaling": True}, "llama3.1"),
        ("llama3", LLAMA, {"use_rope_scaling": True}, "llama3.1"),
        ("llama3.1", MIXTRAL, {}, "mixtral"),
    ],
)
def test_a_model_type_that_the_args_contradict_is_a_warning_with_both(
    said: str, model: Model, args: dict[str, Any], decided: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", model, **args)
    assert convert(tmp_path / "in", tmp_path / "out", "--source-model-type", said) == 0
    assert (
        f"warning: --source-model-type says {said}, the checkpoint's args say {decided}; the args are followed\n"
    ) in capsys.readouterr().err
    family = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert family == ("mixtral" if model.experts else "llama")


@pytest.mark.parametrize(
    ("said", "model", "args"),
    [
        ("mixtral", MIXTRAL, {}),
        ("llama2", LLAMA, {}),
        ("llama3", LLAMA, {}),
        ("llama3.1", LLAMA, {"use_rope_scaling": True}),
    ],
)
def test_a_model_type_that_the_args_allow_is_no_warning(
    said: str, model: Model, args: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", model, **args)
    assert convert(tmp_path / "in", tmp_path / "out", "--source-model-type", said) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "args", "positions"),
    [
        (LLAMA, {"rotary_base": 10000, "max_position_embeddings": 8192}, 8192),
        (LLAMA, {"rotary_base": 10000, "max_position_embeddings": 131072}, 131072),
        (MIXTRAL, {"rotary_base": 10000, "max_position_embeddings": 4096}, 4096),
    ],
)
def test_a_theta_that_habanas_importer_may_have_left_out_is_a_warning_that_names_the_flags(
    model: Model, args: dict[str, Any], positions: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", model, use_fused_rmsnorm=True, **args)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert (
        f"warning: rope_theta is 10000, without rope_scaling, according to the args, for {positions} positions; "
        "Habana's importer writes this whatever the model has. If the checkpoint was imported and not trained since, "
        "give the right values with --like (the original's config.json), or with --rope-theta and "
        "--rope-scaling-factor\n"
    ) in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        {"rotary_base": 10000, "max_position_embeddings": 4096, "use_fused_rmsnorm": True},
        {"rotary_base": 10000, "max_position_embeddings": 131072},  # not of Habana's tree
        {"rotary_base": 500000, "use_fused_rmsnorm": True},
    ],
)
def test_a_theta_that_a_model_may_have_or_without_signs_of_that_importer_is_no_warning(
    args: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", LLAMA, **args)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert "warning" not in capsys.readouterr().err


def test_all_arguments_are_kept_in_the_json_form_that_vars_would_have(tmp_path: Path) -> None:
    model, grid = Model(layers=2), Grid(tp=2, pp=2)
    args = training_args(
        model,
        grid,
        data_path=["0.5", "/data/books", "0.5", "/data/code"],
        adam_eps=1e-8,
        train_iters=500_000,
        exit_signal=None,
        profile_ranks=[0],
        lr_decay_style="cosine",
        load=Path("/ckpts/llama"),
        main_grads_dtype=torch.float32,
        betas=(0.9, 0.95),
        nested={"rank": {"0": [1, 2.5, None]}},
        text="Ärger „und“ \n\t 漢字",
        huge=1 << 80,
    )
    save(tmp_path / "in", megatron_shards(model, hf_tensors(model), grid), args)
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    assert isinstance(args, Namespace)
    expected = json.loads(json.dumps(vars(args), default=str))
    assert json.loads((tmp_path / "out" / "source_megatron_args.json").read_text()) == expected
    assert expected["params_dtype"] == "torch.bfloat16"
    assert expected["load"] == "/ckpts/llama"


def test_shards_that_disagree_about_what_the_model_computes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", MIXTRAL, Grid(tp=2))
    [second] = tmp_path.glob("in/*/mp_rank_01/model_optim_rng.pt")
    saved = torch.load(second, weights_only=False)
    saved["args"].moe_router_pre_softmax = True
    torch.save(saved, second)
    assert convert(tmp_path / "in", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "two shards disagree about moe_router_pre_softmax" in err
    assert "/mp_rank_01/model_optim_rng.pt\n" in err
    assert not (tmp_path / "out").exists()
