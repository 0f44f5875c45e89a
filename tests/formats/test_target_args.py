"""The training arguments of a Megatron target: what they say, where each is from, and what reads them back."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_convert.formats.megatron.args import architecture_from_args
from dist_convert.formats.megatron.grid import Cut, Grid, grid_from_args, place_chunks, stage_layers
from dist_convert.formats.megatron.target_args import (
    Settings,
    TargetArgs,
    TargetDialect,
    TargetInputs,
    padded_vocab,
    target_args,
    target_args_json,
    training_flags,
)
from dist_convert.formats.pickles import Named
from dist_convert.formats.torch.shards import read_shard
from dist_convert.models.schema import Architecture, LinearScaling, RopeScaling, YarnScaling
from dist_convert.options import Options

LLAMA = Architecture(
    family="llama", layers=8, hidden=64, ffn=96, heads=8, query_groups=4, head_dim=16, vocab=250, padded_vocab=256,
    max_positions=8192, norm_epsilon=1e-6, rope_theta=500000.0,
)  # fmt: skip
MIXTRAL = replace(
    LLAMA, family="mixtral", experts=8, experts_per_token=2, router_aux_loss=0.02, rope_theta=1e6, max_positions=65536
)


ONE_RANK = Grid()


def make(architecture: Architecture = LLAMA, grid: Grid = ONE_RANK, **keys: Any) -> TargetArgs:
    """The arguments of a target; `keys` are what a flag, the margs file or the source says of it."""
    job = Options("torch", **keys.get("flags", {}))
    first, last = job.decoder_first_pipeline_num_layers, job.decoder_last_pipeline_num_layers
    cut = Cut(first, last, job.pipeline_model_parallel_layout, grid.virtual_pipeline)
    tokenizer = keys.get("tokenizer_model", "/hf/model"), keys.get("tokenizer_type")
    given = TargetInputs(keys.get("margs"), *tokenizer, carried={}, vocab=keys.get("vocab", architecture.vocab))
    dialect = TargetDialect(keys.get("transformer_impl", "transformer_engine"), keys.get("expert_layout", "sequential"))
    chunks = place_chunks(stage_layers(architecture.layers, grid.pipeline, cut))
    settings = Settings(keys.get("iteration", 7), 128, dialect, grid, chunks)
    return target_args(job, given, architecture, settings, keys.get("params_dtype", "BF16"))


def read_back(args: TargetArgs, directory: Path) -> dict[str, Any]:
    """The arguments as they are read from a file that torch saved, in which dtypes are torch's."""
    values = {
        name: getattr(torch, value.name) if isinstance(value, Named) else value for name, value in args.values.items()
    }
    saved = {"args": Namespace(**values), "checkpoint_version": 3.0, "model": {"weight": torch.zeros(2)}}
    torch.save(saved, directory / "model_optim_rng.pt")
    return read_shard(directory / "model_optim_rng.pt", "model_optim_rng.pt").args


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (LLAMA, {}),
        (LLAMA, {"query_groups": 8}),
        (LLAMA, {"query_groups": 1}),
        (LLAMA, {"tied": True, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)}),
        (LLAMA, {"rope_theta": 10000.5}),
        (LLAMA, {"family": "qwen2", "qkv_bias": True}),
        (LLAMA, {"family": "qwen3", "qk_norm": True, "head_dim": 256}),
        (LLAMA, {"family": "mistral", "sliding_window": 4096}),
        (LLAMA, {"qkv_bias": True, "linear_bias": True}),
        (MIXTRAL, {}),
        (MIXTRAL, {"sliding_window": 4096, "experts_per_token": 1, "router_aux_loss": 0.0}),
    ],
)
@pytest.mark.parametrize("expert_layout", ["sequential", "te-grouped", "grouped", "habana-dynamic"])
def test_the_arguments_are_read_back_as_the_same_model(
    model: Architecture, change: dict[str, Any], expert_layout: str, tmp_path: Path
) -> None:
    wanted = replace(model, **change)
    args = read_back(make(wanted, expert_layout=expert_layout), tmp_path)
    assert architecture_from_args(args, vocab=None, file="") == wanted


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        (LLAMA, Grid(tensor=4, pipeline=2, virtual_pipeline=2, expert_tensor=4)),
        (MIXTRAL, Grid(tensor=2, pipeline=2, virtual_pipeline=1, expert=4, expert_tensor=1)),
        (MIXTRAL, Grid(tensor=2, pipeline=1, virtual_pipeline=1, expert=2, expert_tensor=2)),
    ],
)
def test_the_arguments_are_read_back_as_the_same_grid(model: Architecture, grid: Grid, tmp_path: Path) -> None:
    args = read_back(make(model, grid), tmp_path)
    assert grid_from_args(args, grid.virtual_pipeline, imported_experts=False) == grid


#: What Megatron-LM takes over or compares (`load_args_from_checkpoint`, `check_checkpoint_args`) and a Llama decides.
TAKEN_BY_MEGATRON = {
    "num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 96, "seq_length": 4096, "num_attention_heads": 8,
    "num_query_groups": 4, "group_query_attention": True, "kv_channels": 16, "max_position_embeddings": 8192,
    "position_embedding_type": "rope", "add_position_embedding": True, "rotary_base": 500000, "rotary_percent": 1.0,
    "rotary_interleaved": False, "add_bias_linear": False, "add_qkv_bias": False, "squared_relu": False,
    "swiglu": True, "untie_embeddings_and_output_weights": True, "apply_layernorm_1p": False,
    "normalization": "RMSNorm", "apply_query_key_layer_scaling": False, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "num_experts": None, "moe_ffn_hidden_size": None, "tokenizer_model": "/hf/model",
    "tokenizer_type": "HuggingFaceTokenizer", "padded_vocab_size": 256, "vocab_size": 250, "ckpt_format": "torch",
    "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
    "num_layers_per_virtual_pipeline_stage": 2, "expert_model_parallel_size": 1, "consumed_train_samples": 0,
    "consumed_valid_samples": 0, "skipped_train_samples": 0, "make_vocab_size_divisible_by": 128,
    "no_save_optim": True, "no_save_rng": True, "iteration": 7, "norm_epsilon": 1e-6, "use_rope_scaling": False,
    "bf16": True, "fp16": False, "params_dtype": Named("torch", "bfloat16"), "sequence_parallel": False,
    "world_size": 8, "data_parallel_size": 1, "transformer_impl": "transformer_engine",
}  # fmt: skip


def test_everything_that_training_resumes_from_is_there() -> None:
    values = make(grid=Grid(tensor=4, pipeline=2, virtual_pipeline=2, expert_tensor=4)).values
    assert {name: values.get(name, "absent") for name in TAKEN_BY_MEGATRON} == TAKEN_BY_MEGATRON


@pytest.mark.parametrize(
    ("layout", "grouped", "legacy", "habana"),
    [
        ("sequential", False, False, False),
        ("te-grouped", True, False, False),
        ("grouped", True, True, False),
        ("habana-dynamic", False, False, True),
    ],
)
def test_the_arguments_choose_the_class_of_experts_that_the_tensors_are_named_for(
    layout: str, grouped: bool, legacy: bool, habana: bool
) -> None:
    margs = {"moe_grouped_gemm": not grouped, "moe_dynamic_hpu": not habana, "moe_capacity_bins_num": 10}
    values = make(MIXTRAL, expert_layout=layout, margs=margs).values
    assert (values["moe_grouped_gemm"], values["moe_use_legacy_grouped_gemm"]) == (grouped, legacy)
    names = ("moe_dynamic_hpu", "moe_permuted_weights", "moe_fused_weights")
    assert [values[name] for name in names] == [habana] * 3
    assert values["moe_capacity_bins_num"] == (0 if habana else 10)  # dynamic experts have no bins


def test_a_model_without_experts_has_nothing_to_say_about_them() -> None:
    values = make(grid=Grid(tensor=4, expert_tensor=1)).values
    assert values["expert_tensor_parallel_size"] == 4
    assert [name for name in values if name.startswith("moe_")] == ["moe_ffn_hidden_size"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"params_dtype": "F16"}, {"params_dtype": Named("torch", "float16"), "bf16": False, "fp16": True}),
        ({"params_dtype": "F32"}, {"params_dtype": Named("torch", "float32"), "bf16": False, "fp16": False}),
        ({"iteration": None}, {"iteration": 0}),
        ({"transformer_impl": "local"}, {"transformer_impl": "local"}),
        ({"transformer_impl": "habana"}, {"transformer_impl": "transformer_engine"}),
        ({"tokenizer_model": None}, {"tokenizer_model": None, "tokenizer_type": "HuggingFaceTokenizer"}),
        ({"tokenizer_model": "/t.model"}, {"tokenizer_model": "/t.model", "tokenizer_type": "Llama2Tokenizer"}),
        ({"tokenizer_type": "NullTokenizer"}, {"tokenizer_type": "NullTokenizer"}),
        ({"vocab": 200}, {"vocab_size": 200, "padded_vocab_size": 256}),
    ],
)
def test_a_flag_decides_its_arguments(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    values = make(**keys).values
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("grid", "uneven", "expected"),
    [
        (Grid(pipeline=4), (None, None, None), (None, None, None, None, None)),
        (Grid(pipeline=2, virtual_pipeline=2), (None, None, None), (2, 2, None, None, None)),
        (Grid(pipeline=4), (1, 3, None), (None, None, None, 1, 3)),
        (Grid(pipeline=3, virtual_pipeline=2), (2, 2, None), (2, None, 2, 2, 2)),
        (Grid(pipeline=2, virtual_pipeline=2), (None, None, "Et|t*3|ttt|tL"), (2, None, None, None, None)),
    ],
)
def test_a_pipeline_is_described_by_one_kind_of_argument_as_megatron_demands(
    grid: Grid, uneven: tuple[int | None, int | None, str | None], expected: tuple[object, ...]
) -> None:
    names = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout")
    values = make(grid=grid, flags=dict(zip(names, uneven, strict=True))).values
    assert expected == (
        values["virtual_pipeline_model_parallel_size"],
        values["num_layers_per_virtual_pipeline_stage"],
        values["num_virtual_stages_per_pipeline_rank"],
        values["decoder_first_pipeline_num_layers"],
        values["decoder_last_pipeline_num_layers"],
    )
    assert values["pipeline_model_parallel_layout"] == uneven[2]


@pytest.mark.parametrize(
    ("model", "grid", "world_size", "data_parallel", "sequence_parallel"),
    [
        (LLAMA, Grid(4, 2, 1, 1, 4), 8, 1, False),
        (MIXTRAL, Grid(1, 1, 1, 4, 1), 4, 4, False),
        (MIXTRAL, Grid(2, 2, 1, 4, 1), 8, 2, True),  # Megatron-LM demands it of experts with tensor parallelism
        (MIXTRAL, Grid(4, 1, 1, 2, 4), 8, 2, True),
    ],
)
def test_the_world_is_the_smallest_that_has_all_ranks_of_the_grid(
    model: Architecture, grid: Grid, world_size: int, data_parallel: int, sequence_parallel: bool
) -> None:
    values = make(model, grid).values
    assert (values["world_size"], values["data_parallel_size"]) == (world_size, data_parallel)
    assert values["sequence_parallel"] is sequence_parallel


def test_the_json_file_holds_the_values_and_where_each_is_from() -> None:
    args = make(replace(MIXTRAL, sliding_window=128))
    found = json.loads(target_args_json(args))
    assert found.pop("origins_of_arguments") == args.origins
    assert list(found) == list(args.values)
    assert (found["params_dtype"], found["window_size"], found["num_experts"]) == ("torch.bfloat16", [127, 0], 8)


@pytest.mark.parametrize(
    ("vocab", "divisible_by", "tensor", "padded"),
    [(32000, 128, 1, 32000), (32000, 128, 8, 32768), (128256, 128, 4, 128512), (250, 1, 1, 250), (1, 128, 2, 256)],
)
def test_a_vocabulary_is_padded_to_a_multiple_on_every_tensor_parallel_rank(
    vocab: int, divisible_by: int, tensor: int, padded: int
) -> None:
    assert padded_vocab(vocab, divisible_by, tensor) == padded


@pytest.mark.parametrize(
    ("change", "flags"),
    [
        ({}, []),
        ({"norm_epsilon": 1e-6}, ["--norm-epsilon 1e-06"]),
        ({"rope_scaling": RopeScaling(32.0)}, ["--rope-scaling-factor 32.0", "--use-rope-scaling"]),
        ({"family": "qwen3", "qk_norm": True}, ["--qk-layernorm"]),
        ({"family": "mistral", "sliding_window": 4096}, ["--window-size 4095,0"]),
        ({"rope_scaling": LinearScaling(4.0)}, ["--rotary-seq-len-interpolation-factor 4"]),
        (
            {"rope_scaling": YarnScaling(4.0, 32.0, 1.0, 32768, 1.0, 0.0, truncate=False)},
            [
                "--no-yarn-correction-range-round-to-int",
                "--mscale 1.0",
                "--rotary-scaling-factor 4.0",
                "--yarn-beta-fast 32.0",
                "--yarn-beta-slow 1.0",
                "--yarn-original-max-position-embeddings 32768",
            ],
        ),
    ],
)
def test_what_training_does_not_take_from_a_checkpoint_is_said_in_its_flags(
    change: dict[str, Any], flags: list[str]
) -> None:
    architecture = replace(LLAMA, **{"norm_epsilon": 1e-5, "rope_scaling": None, **change})
    assert training_flags(architecture) == flags
    written = json.loads(target_args_json(make(architecture), training_flags(architecture)))
    assert written.get("training_flags", []) == flags
