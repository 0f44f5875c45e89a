"""The parallel grid: names of rank directories, which of them hold which shard, and in which order layers come."""

from __future__ import annotations

from typing import Any

import pytest

from dist_convert.errors import MissingShard, UnsupportedModel
from dist_convert.formats.megatron.grid import (
    Chunk,
    Grid,
    Rank,
    ShardFiles,
    find_shards,
    grid_from_args,
    is_rank_directory,
    place_chunks,
    rank_directory,
)


def held(name: str) -> str:
    return f"{name}/model_optim_rng.pt"


@pytest.mark.parametrize(
    ("pipeline", "expert", "name"),
    [
        (1, 1, "mp_rank_03"),
        (4, 1, "mp_rank_03_002"),
        (1, 8, "mp_rank_03_005"),
        (4, 8, "mp_rank_03_002_005"),
    ],
)
def test_a_directory_names_the_pipeline_and_expert_rank_only_where_there_are_several(
    pipeline: int, expert: int, name: str
) -> None:
    grid = Grid(4, pipeline, 1, expert, 4)
    rank = Rank(pipeline=2 if pipeline > 1 else 0, tensor=3, expert=5 if expert > 1 else 0)
    assert rank_directory(grid, rank) == name


def test_digits_of_a_directory_are_minimum_widths() -> None:
    grid = Grid(128, 2048, 1, 1024, 128)
    assert rank_directory(grid, Rank(pipeline=1999, tensor=100, expert=1001)) == "mp_rank_100_1999_1001"


def test_virtual_stages_have_no_part_in_the_name() -> None:
    assert rank_directory(Grid(2, 1, 4, 1, 2), Rank(pipeline=0, tensor=1, expert=0)) == "mp_rank_01"


@pytest.mark.parametrize("name", ["mp_rank_00", "mp_rank_00_001", "mp_rank_00_001_002", "mp_rank_100_1999_1001"])
def test_names_of_rank_directories_are_known(name: str) -> None:
    assert is_rank_directory(name)


@pytest.mark.parametrize(
    "name",
    ["mp_rank", "mp_rank_", "mp_rank_0a", "mp_rank_00_", "mp_rank_00.bak", "mp_rank_0_0_0_0", "rank_00", "dist_00_00"],
)
def test_other_names_are_no_rank_directories(name: str) -> None:
    assert not is_rank_directory(name)


def test_two_suffixes_are_pipeline_ranks_where_the_args_say_so() -> None:
    found = find_shards(Grid(pipeline=2), map(held, ["mp_rank_00_000", "mp_rank_00_001"]))
    assert dense(found) == {(0, None, 0): (held("mp_rank_00_000"),), (1, None, 0): (held("mp_rank_00_001"),)}


def test_two_suffixes_are_expert_ranks_where_the_args_say_so() -> None:
    found = find_shards(Grid(expert=2), map(held, ["mp_rank_00_000", "mp_rank_00_001"]))
    assert found == {
        (0, None, 0): (held("mp_rank_00_000"), held("mp_rank_00_001")),
        (0, 0, 0): (held("mp_rank_00_000"),),
        (0, 1, 0): (held("mp_rank_00_001"),),
    }


def test_with_etp_1_a_file_holds_a_dense_shard_by_its_tensor_rank_and_whole_experts_by_its_expert_rank() -> None:
    names = ["mp_rank_00_000", "mp_rank_01_001", "mp_rank_00_002", "mp_rank_01_003"]
    found = find_shards(Grid(tensor=2, expert=4, expert_tensor=1), map(held, names))
    assert found == {
        (0, None, 0): (held("mp_rank_00_000"), held("mp_rank_00_002")),
        (0, None, 1): (held("mp_rank_01_001"), held("mp_rank_01_003")),
        (0, 0, 0): (held("mp_rank_00_000"),),
        (0, 1, 0): (held("mp_rank_01_001"),),
        (0, 2, 0): (held("mp_rank_00_002"),),
        (0, 3, 0): (held("mp_rank_01_003"),),
    }


def test_with_etp_2_of_tp_4_the_expert_tensor_rank_is_the_tensor_rank_modulo_2() -> None:
    names = ["mp_rank_00_000", "mp_rank_01_000", "mp_rank_02_001", "mp_rank_03_001"]
    found = find_shards(Grid(tensor=4, expert=2, expert_tensor=2), map(held, names))
    assert experts(found) == {
        (0, 0, 0): (held("mp_rank_00_000"),),
        (0, 0, 1): (held("mp_rank_01_000"),),
        (0, 1, 0): (held("mp_rank_02_001"),),
        (0, 1, 1): (held("mp_rank_03_001"),),
    }


def dense(found: ShardFiles) -> ShardFiles:
    return {shard: files for shard, files in found.items() if shard[1] is None}


def experts(found: ShardFiles) -> ShardFiles:
    return {shard: files for shard, files in found.items() if shard[1] is not None}


def test_tensor_shards_that_training_never_wrote_are_missing_and_the_message_says_why() -> None:
    with pytest.raises(MissingShard) as error:
        find_shards(Grid(tensor=8, expert=1, expert_tensor=1), map(held, ["mp_rank_00"]))
    assert str(error.value) == (
        "7 rank directories of TP8 PP1 VPP1 EP1 ETP1 missing\n"
        "  expected: model_optim_rng.pt in mp_rank_01, mp_rank_02, mp_rank_03, mp_rank_04, mp_rank_05, mp_rank_06 "
        "and 1 more\n"
        "  found:    mp_rank_00\n"
        "  remedy:   copy the missing directories beside the others; Megatron-Core before 0.18 does not write "
        "all tensor parallel shards if TP is larger than EP x ETP: then save again with a newer version"
    )


def test_the_same_grid_is_whole_where_a_newer_megatron_wrote_all_tensor_ranks() -> None:
    names = [f"mp_rank_{rank:02d}" for rank in range(8)]
    found = find_shards(Grid(tensor=8, expert=1, expert_tensor=1), map(held, names))
    assert len(dense(found)) == 8
    assert experts(found) == {(0, 0, 0): tuple(held(name) for name in names)}


def test_a_missing_stage_is_named() -> None:
    with pytest.raises(MissingShard) as error:
        find_shards(
            Grid(tensor=2, pipeline=2, expert_tensor=2),
            map(held, ["mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001"]),
        )
    assert error.value.expected == "model_optim_rng.pt in mp_rank_01_001"
    assert error.value.remedy == "copy the missing directories beside the others"


def test_a_directory_that_the_args_do_not_name_is_refused() -> None:
    with pytest.raises(MissingShard) as error:
        find_shards(Grid(tensor=2, expert_tensor=2), map(held, ["mp_rank_00", "mp_rank_01", "mp_rank_02"]))
    assert error.value.found == "mp_rank_02"
    assert error.value.expected == "the directories of TP2 PP1 VPP1 EP1 ETP2"


def test_directories_of_another_grid_are_told_together_with_those_that_are_missing() -> None:
    with pytest.raises(MissingShard) as error:
        find_shards(Grid(tensor=2, expert_tensor=2), map(held, ["mp_rank_00_000", "mp_rank_01_000"]))
    assert error.value.found == "mp_rank_00_000, mp_rank_01_000"
    assert "missing: mp_rank_00, mp_rank_01" in error.value.expected


MOE = {"num_experts": 8, "tensor_model_parallel_size": 4, "expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("args", "chunks", "grid"),
    [
        ({}, 1, Grid(1, 1, 1, 1, 1)),
        ({"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4}, 1, Grid(8, 4, 1, 1, 8)),
        ({"pipeline_model_parallel_size": 4}, 3, Grid(1, 4, 3, 1, 1)),
        ({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, 1, Grid(2, 1, 1, 1, 2)),
        (MOE, 1, Grid(4, 1, 1, 2, 4)),
        (MOE | {"expert_tensor_parallel_size": None}, 1, Grid(4, 1, 1, 2, 4)),
        (MOE | {"expert_tensor_parallel_size": 1}, 1, Grid(4, 1, 1, 2, 1)),
        (MOE | {"expert_tensor_parallel_size": 2}, 1, Grid(4, 1, 1, 2, 2)),
    ],
    ids=["nothing said", "dense", "virtual stages", "dense has no ETP", "old", "ETP None", "ETP 1", "ETP 2"],
)
def test_the_grid_follows_from_the_args_and_the_models_in_a_file(args: dict[str, Any], chunks: int, grid: Grid) -> None:
    assert grid_from_args(args, chunks, imported_experts=False) == grid


def test_imported_experts_are_split_over_all_tensor_ranks_whatever_the_args_say() -> None:
    grid = grid_from_args(MOE | {"expert_tensor_parallel_size": 1}, 1, imported_experts=True)
    assert grid == Grid(4, 1, 1, 2, 4)


@pytest.mark.parametrize("expert_tensor", [3, 8])
def test_expert_tensor_sizes_that_do_not_divide_tp_are_refused_because_shards_are_lost(expert_tensor: int) -> None:
    with pytest.raises(UnsupportedModel, match="only one of them was kept") as error:
        grid_from_args(MOE | {"expert_tensor_parallel_size": expert_tensor}, 1, imported_experts=False)
    assert error.value.found == f"{expert_tensor} and 4"


def test_experts_split_over_tensor_and_expert_ranks_together_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="moe-extended-tp"):
        grid_from_args(MOE | {"moe_extended_tp": True}, 1, imported_experts=False)


def test_the_flag_of_extended_tensor_parallelism_means_nothing_to_versions_that_ignore_it() -> None:
    args = MOE | {"moe_extended_tp": True, "expert_tensor_parallel_size": 4}
    assert grid_from_args(args, 1, imported_experts=False) == Grid(4, 1, 1, 2, 4)


def test_layers_of_uneven_stages_are_numbered_as_they_are_counted() -> None:
    assert place_chunks([[2, 5, 0, 1]]) == (
        Chunk(pipeline=0, virtual=0, first_layer=0, layers=2),
        Chunk(pipeline=1, virtual=0, first_layer=2, layers=5),
        Chunk(pipeline=2, virtual=0, first_layer=7, layers=0),
        Chunk(pipeline=3, virtual=0, first_layer=7, layers=1),
    )


def test_virtual_stages_are_passed_one_after_the_other_each_through_all_pipeline_ranks() -> None:
    assert place_chunks([[2, 2], [2, 2]]) == (
        Chunk(pipeline=0, virtual=0, first_layer=0, layers=2),
        Chunk(pipeline=1, virtual=0, first_layer=2, layers=2),
        Chunk(pipeline=0, virtual=1, first_layer=4, layers=2),
        Chunk(pipeline=1, virtual=1, first_layer=6, layers=2),
    )
