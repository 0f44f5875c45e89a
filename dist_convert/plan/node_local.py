"""Targets on the nodes' own disks: which node gets which rank directories, and how files of one name are told apart.

Pure: integers and strings. A place is a directory as some ranks see it; nodes that share a disk share a place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_convert.errors import UsageError
from dist_convert.layout import SHARD_FILE, Grid, Rank, rank_directory


def files_of_nodes(grid: Grid, nodes: int, ranks_per_node: int) -> tuple[frozenset[str], ...]:
    """For each node, the rank files that its training processes load.

    Training numbers its processes node by node, and places them in Megatron's default order: tensor parallel first,
    then expert and data parallel, pipeline last (docs/formats.md, "Rank directories").

    Args:
        grid: of the target.
        nodes: of training, the same as those of the conversion.
        ranks_per_node: training processes on each.

    Raises:
        UsageError: so many processes cannot hold whole replicas of the model.
    """
    processes = nodes * ranks_per_node
    in_stage = math.lcm(grid.tensor, grid.expert_tensor * grid.expert)
    if processes % (in_stage * grid.pipeline):
        raise UsageError(
            f"{nodes} nodes with {ranks_per_node} training processes each do not hold whole replicas of {grid}",
            expected=f"a multiple of {in_stage * grid.pipeline} processes",
            found=f"{processes} processes",
            remedy="give the training processes of each node with --target-ranks-per-node, and start the conversion "
            "on the nodes that train",
        )
    per_stage = processes // grid.pipeline
    listed = [
        Rank(number // per_stage, number % grid.tensor, number // grid.expert_tensor % grid.expert)
        for number in range(processes)
    ]
    return tuple(
        frozenset(
            f"{rank_directory(grid, rank)}/{SHARD_FILE}"
            for rank in listed[node * ranks_per_node : (node + 1) * ranks_per_node]
        )
        for node in range(nodes)
    )


def check_rank_order(args: Mapping[str, Any] | None) -> None:
    """Refuse training arguments that number processes in another order than `files_of_nodes` does.

    Raises:
        UsageError: pipeline ranks are numbered before data parallel ones.
    """
    if args is not None and args.get("use_tp_pp_dp_mapping"):
        raise UsageError(
            "training with use_tp_pp_dp_mapping puts other rank directories on a node",
            expected="Megatron's default order of ranks",
            found="use_tp_pp_dp_mapping in the margs file",
            remedy="set it to false there, or convert to a shared --save-dir and copy the directories to their nodes",
        )


def files_of_places(
    grid: Grid, place_of_rank: Sequence[int], node_of_rank: Sequence[int], ranks_per_node: int
) -> tuple[frozenset[str], ...]:
    """For each place, the rank files of all its nodes.

    Raises:
        UsageError: see `files_of_nodes`.
    """
    of_nodes = files_of_nodes(grid, max(node_of_rank) + 1, ranks_per_node)
    pairs = list(zip(place_of_rank, node_of_rank, strict=True))
    return tuple(
        frozenset[str]().union(*(of_nodes[node] for of_rank, node in pairs if of_rank == place))
        for place in range(max(place_of_rank) + 1)
    )


def name_at(place: int, file: str) -> str:
    """A file's name in the plan of a target that lies at several places."""
    return f"{place}:{file}"


def local_name(file: str) -> str:
    """The name of a planned file in its own place."""
    return file.partition(":")[2] or file
