"""Which node gets which rank directories where the target lies on the nodes' own disks."""

from __future__ import annotations

import pytest

from dist_convert.errors import UsageError
from dist_convert.formats.megatron.grid import Grid, files_of_disks
from dist_convert.records import local_name, name_at


def directories(grid: Grid, nodes: int, ranks_per_node: int) -> list[list[str]]:
    found = files_of_disks(grid, range(nodes), range(nodes), ranks_per_node, None)
    return [sorted(file.split("/")[0] for file in files) for files in found]


@pytest.mark.parametrize(
    ("grid", "nodes", "ranks_per_node", "expected"),
    [
        (Grid(expert_tensor=1), 2, 1, [["mp_rank_00"], ["mp_rank_00"]]),
        (Grid(tensor=2, expert_tensor=2), 2, 1, [["mp_rank_00"], ["mp_rank_01"]]),
        (Grid(tensor=2, pipeline=2, expert_tensor=2), 2, 2,
         [["mp_rank_00_000", "mp_rank_01_000"], ["mp_rank_00_001", "mp_rank_01_001"]]),
        # Data parallel replicas are numbered within a stage, so the first two nodes hold the first stage.
        (Grid(tensor=2, pipeline=2, expert_tensor=2), 4, 2,
         [["mp_rank_00_000", "mp_rank_01_000"]] * 2 + [["mp_rank_00_001", "mp_rank_01_001"]] * 2),
        (Grid(tensor=1, expert=4, expert_tensor=1), 2, 2,
         [["mp_rank_00_000", "mp_rank_00_001"], ["mp_rank_00_002", "mp_rank_00_003"]]),
        (Grid(tensor=2, expert=2, expert_tensor=1), 2, 1, [["mp_rank_00_000"], ["mp_rank_01_001"]]),
    ],
)  # fmt: skip
def test_processes_fill_tensor_then_expert_and_data_then_pipeline_ranks(
    grid: Grid, nodes: int, ranks_per_node: int, expected: list[list[str]]
) -> None:
    assert directories(grid, nodes, ranks_per_node) == expected


def test_processes_that_hold_no_whole_replica_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        directories(Grid(tensor=4, pipeline=2, expert_tensor=4), nodes=3, ranks_per_node=4)
    assert (caught.value.expected, caught.value.found) == ("a multiple of 8 processes", "12 processes")


def test_another_order_of_ranks_is_refused() -> None:
    assert len(files_of_disks(Grid(), [0, 1], [0, 1], 1, {"use_tp_pp_dp_mapping": False})) == 2
    with pytest.raises(UsageError, match="use_tp_pp_dp_mapping puts other rank directories on a node"):
        files_of_disks(Grid(), [0, 1], [0, 1], 1, {"use_tp_pp_dp_mapping": True})


def test_nodes_that_share_a_disk_put_their_directories_together() -> None:
    grid = Grid(pipeline=4, expert_tensor=1)
    found = files_of_disks(grid, [0, 0, 1, 1], [0, 1, 2, 3], ranks_per_node=1, args=None)
    names = [sorted(file.split("/")[0] for file in files) for files in found]
    assert names == [["mp_rank_00_000", "mp_rank_00_001"], ["mp_rank_00_002", "mp_rank_00_003"]]


def test_a_files_name_in_the_plan_tells_its_place() -> None:
    assert name_at(3, "mp_rank_00/model_optim_rng.pt") == "3:mp_rank_00/model_optim_rng.pt"
    assert local_name("3:mp_rank_00/model_optim_rng.pt") == "mp_rank_00/model_optim_rng.pt"
    assert local_name("mp_rank_00/model_optim_rng.pt") == "mp_rank_00/model_optim_rng.pt"
