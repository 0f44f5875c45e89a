"""Arguments as other programs save them: read where it is known what they mean, and refused by name else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import dist_convert
from dist_convert.errors import ConversionError
from tests.checkpoints import Grid, Model, hf_tensors, make, megatron_shards, save, training_args

MODEL, ALONE = Model(layers=2), Grid()
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MINDSPEED = {
    "rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "rope_scaling_original_max_position_embeddings": 8192,
}  # fmt: skip


def with_args(root: Path, model: Model = MODEL, grid: Grid = ALONE, drop: tuple[str, ...] = (), **more: Any) -> Path:
    args = training_args(model, grid, **more)
    for name in drop:
        delattr(args, name)
    save(root / "megatron", megatron_shards(model, hf_tensors(model), grid), args)
    return root / "megatron"


def config_of(source: Path, target: Path) -> dict[str, Any]:
    dist_convert.convert(source, target, to="huggingface")
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    return config


@pytest.mark.parametrize(
    "args",
    [
        {"hidden_size": numpy.int64(16), "norm_epsilon": numpy.float64(1e-5), "num_layers": numpy.int32(2)},
        {"hidden_size": "16", "norm_epsilon": "1e-05", "num_layers": "2", "rotary_base": " 500000"},
        {"rotary_base": numpy.float32(500000), "swiglu": numpy.bool_(True)},
        {"use_rope_scaling": "False", "swiglu": "True"},
    ],
    ids=["numpy's", "texts", "numpy's of 32 bits", "texts of truths"],
)
def test_numbers_of_numpy_and_texts_of_numbers_are_numbers(args: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path / "plain" / "megatron", MODEL)
    expected = config_of(tmp_path / "plain" / "megatron", tmp_path / "expected")
    assert config_of(with_args(tmp_path, **args), tmp_path / "found") == expected


@pytest.mark.parametrize(
    "args", [MINDSPEED, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
             {"rope_scaling": json.dumps({"type": "llama3", **LLAMA3})}], ids=["MindSpeed-LLM", "a dict", "JSON"],
)  # fmt: skip
def test_rotary_scaling_in_the_words_of_forks_is_read(args: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(with_args(tmp_path, **args), tmp_path / "hf")
    assert config["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}


#: As ms-swift takes it over from transformers; 64 positions are the model's.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (YARN, {"beta_fast": 32.0, "beta_slow": 1.0}),
        ({**YARN, "type": "yarn", "beta_fast": 16, "rope_theta": 500000.0}, {"beta_fast": 16, "beta_slow": 1.0}),
        ({**YARN, "truncate": False, "attention_factor": None}, {"truncate": False}),
    ],
    ids=["plain", "of transformers 5", "not rounded"],
)
def test_yarn_in_the_words_of_ms_swift_is_read(said: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    scaling = config_of(with_args(tmp_path, rope_scaling=said), tmp_path / "hf")["rope_scaling"]
    assert {**scaling, **YARN, **expected} == scaling


def test_no_scaling_in_the_words_of_transformers_5_is_none(tmp_path: Path) -> None:
    said = {"rope_type": "default", "rope_theta": 500000.0}
    assert config_of(with_args(tmp_path, rope_scaling=said), tmp_path / "hf")["rope_scaling"] is None


@pytest.mark.parametrize(
    "args",
    [
        {"rope_scaling": {**YARN, "factor": 2.0}},  # of which some versions of transformers make 64 / 16
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": {**YARN, "rope_theta": 10000.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0}},
        {**MINDSPEED, "high_freq_factor": 8.0},
        {"rope_scaling_type": "yarn"},
    ],
    ids=["ratio", "mscale", "theta", "theta alone", "llama3", "MindSpeed-LLM", "MindSpeed-LLM's yarn"],
)
def test_a_fork_s_scaling_that_is_not_sure_is_refused_with_the_flag_that_says_it(
    args: dict[str, Any], tmp_path: Path
) -> None:
    make(tmp_path / "plain" / "megatron", MODEL)
    config_of(tmp_path / "plain" / "megatron", tmp_path / "like")
    source = with_args(tmp_path, **args)
    with pytest.raises(ConversionError, match=r"--rope-scaling(-type)? has a value") as caught:
        config_of(source, tmp_path / "hf")
    assert "--like CONFIG says which scaling the model has" in caught.value.remedy
    dist_convert.convert(source, tmp_path / "hf", to="huggingface", like=tmp_path / "like")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_scaling"] is None


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"norm_epsilon": -1e-5}, "norm_epsilon"),
        ({"rotary_base": -5}, "rotary_base"),
        ({"rotary_base": 0}, "rotary_base"),
        ({"num_layers": "four"}, "num_layers"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0}}, "rope-scaling"),
        ({"geglu": True}, "geglu"),
        ({"embed_layernorm": True}, "embed-layernorm"),
        ({"logits_scaling": 8.0}, "logits-scaling"),
        ({"final_logit_softcapping": 30.0}, "final-logit-softcapping"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer-types"),
        ({"layernorm_zero_centered_gamma": True}, "layernorm-zero-centered-gamma"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_another_model_is_refused_by_name(args: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=name):
        config_of(with_args(tmp_path, **args), tmp_path / "hf")


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"moe_router_topk": 5}, "more experts for each token"),
        ({"expert_interval": 2}, "expert-interval"),
        ({"routed_scaling_factor": 2.5}, "routed-scaling-factor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_another_model_of_experts_is_refused_by_name(
    args: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=name):
        config_of(with_args(tmp_path, Model(layers=2, experts=4), **args), tmp_path / "hf")


@pytest.mark.parametrize("grid", [Grid(tp=2), Grid(pp=2), Grid(tp=2, pp=2)], ids=str)
def test_directories_tell_the_sizes_that_args_lack(grid: Grid, tmp_path: Path) -> None:
    lacking = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    make(tmp_path / "plain" / "megatron", MODEL, grid)
    expected = config_of(tmp_path / "plain" / "megatron", tmp_path / "expected")
    assert config_of(with_args(tmp_path, grid=grid, drop=lacking), tmp_path / "found") == expected


def test_a_lost_rank_is_no_smaller_grid_where_args_lack_it(tmp_path: Path) -> None:
    source = with_args(tmp_path, grid=Grid(tp=2), drop=("tensor_model_parallel_size",))
    (source / "iter_0000004" / "mp_rank_01").rename(tmp_path / "lost")
    with pytest.raises(ConversionError):
        config_of(source, tmp_path / "hf")


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (
            Grid(tp=4),
            Grid(tp=2),
            "[16, 16] in mp_rank_00, mp_rank_01; [8, 16] in mp_rank_02, mp_rank_03",
        ),
        (
            Grid(tp=2, pp=2),
            Grid(pp=2),
            "[32, 16] in mp_rank_00_000; [16, 16] in mp_rank_01_000",
        ),
        (
            Grid(tp=2),
            Grid(pp=2),
            "names with 1 number in mp_rank_00, mp_rank_01; names with 2 numbers in mp_rank_00_000, mp_rank_00_001",
        ),
    ],
    ids=str,
)
def test_directories_of_two_grids_are_named_where_args_lack_the_sizes(
    first: Grid, second: Grid, found: str, tmp_path: Path
) -> None:
    lacking = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_tensor_parallel_size")
    model = Model(layers=2, groups=4)
    with_args(tmp_path / "second", model, second, lacking)
    source = with_args(tmp_path, model, first, lacking)
    shutil.copytree(tmp_path / "second" / "megatron", source, dirs_exist_ok=True)
    with pytest.raises(ConversionError, match="rank directories of two grids") as caught:
        config_of(source, tmp_path / "hf")
    assert caught.value.file == str(source / "iter_0000004")
    assert caught.value.found == found
    assert caught.value.tensor == ("" if "number" in found else "embedding.word_embeddings.weight")


def test_where_a_rank_has_another_name_nothing_is_advised_that_would_lose_its_shard(tmp_path: Path) -> None:
    source = with_args(tmp_path, grid=Grid(tp=2))
    (source / "iter_0000004" / "mp_rank_01").rename(source / "iter_0000004" / "mp_rank_01_000")
    with pytest.raises(ConversionError, match="rank directories that the checkpoint's own args do not name") as caught:
        config_of(source, tmp_path / "hf")
    # Nothing is to be removed or left out: the other directory may be this one's lost shard.
    assert caught.value.remedy == (
        "two checkpoints may share this directory: copy the right one, complete, from where it was saved to a "
        "directory of its own"
    )


@pytest.mark.parametrize("rows", [64, 100], ids=str)
def test_a_head_of_another_shape_is_no_copy_of_the_embedding_that_args_tie_it_to(rows: int, tmp_path: Path) -> None:
    tied = Model(layers=2, tied=True)
    shards = megatron_shards(tied, hf_tensors(tied), Grid(pp=2))
    [*_, last] = shards.values()
    last[0]["output_layer.weight"] = torch.zeros(rows, tied.hidden, dtype=torch.bfloat16)
    save(tmp_path / "megatron", shards, training_args(tied, Grid(pp=2)))
    with pytest.raises(ConversionError, match="the args tie the head to the embedding, but their shapes differ"):
        config_of(tmp_path / "megatron", tmp_path / "hf")
