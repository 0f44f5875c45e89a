"""The parallel grid of a Megatron checkpoint: rank directories, pipeline chunks and who owns which expert.

Facts: docs/formats.md, "Rank directories" and "Splitting over ranks".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_convert.errors import MissingShard, UnsupportedModel
from dist_convert.models.limits import MOST_RANKS, is_size

SHARD_FILE = "model_optim_rng.pt"


@dataclass(frozen=True)
class Grid:
    """Parallel sizes: tensor, pipeline, virtual pipeline, expert, expert tensor."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def __str__(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} VPP{self.virtual_pipeline} EP{self.expert} ETP{self.expert_tensor}"


@dataclass(frozen=True, order=True)
class Rank:
    """A file's place in the grid. `expert_tensor` follows from `tensor` and has no part in the name."""

    pipeline: int
    tensor: int
    expert: int


def rank_directory(grid: Grid, rank: Rank) -> str:
    """The directory's name: `mp_rank_TT`, `_PPP` only if PP > 1, then `_EEE` only if EP > 1."""
    name = f"mp_rank_{rank.tensor:02d}"
    if grid.pipeline > 1:
        name += f"_{rank.pipeline:03d}"
    if grid.expert > 1:
        name += f"_{rank.expert:03d}"
    return name


def is_rank_directory(name: str) -> bool:
    """Whether a directory's name is of the form `mp_rank_N`, `mp_rank_N_N` or `mp_rank_N_N_N`."""
    prefix, rank, *numbers = name.split("_", 2) if name.count("_") >= 2 else ("", "", "")
    parts = numbers[0].split("_") if numbers else []
    return (prefix, rank) == ("mp", "rank") and 1 <= len(parts) <= 3 and all(part.isdecimal() for part in parts)


def grid_from_args(args: Mapping[str, Any], chunks: int, *, imported_experts: bool) -> Grid:
    """The grid that training ran with.

    Args:
        args: the training arguments.
        chunks: models found in each file, the virtual pipeline size.
        imported_experts: Habana's importer made the checkpoint; it splits experts over all tensor parallel ranks and
            leaves expert_tensor_parallel_size at 1.

    Raises:
        UnsupportedModel: a grid whose files cannot hold the whole model, or are split in a way that is not read.
    """
    tensor = args.get("tensor_model_parallel_size") or 1
    expert = args.get("expert_model_parallel_size") or 1
    expert_tensor = args.get("expert_tensor_parallel_size") or tensor
    if imported_experts or not args.get("num_experts"):
        expert_tensor = tensor
    grid = Grid(tensor, args.get("pipeline_model_parallel_size") or 1, chunks, expert, expert_tensor)
    sizes = (tensor, grid.pipeline, expert, expert_tensor)
    if not all(is_size(size, MOST_RANKS) for size in sizes) or tensor * grid.pipeline * expert > MOST_RANKS:
        raise UnsupportedModel(
            "a parallel grid of impossible sizes",
            expected=f"whole numbers, and at most {MOST_RANKS} ranks",
            found=str(grid)[:80],
            remedy="the args are damaged; copy the checkpoint again from where it was saved",
        )
    if tensor % expert_tensor:
        raise UnsupportedModel(
            "several expert tensor parallel ranks of this grid shared one file name; only one of them was kept",
            expected="expert_tensor_parallel_size divides tensor_model_parallel_size",
            found=str(grid),
            remedy="the lost expert shards are in no file; save the checkpoint again with expert_tensor <= tensor",
        )
    # Versions that know expert_tensor_parallel_size parse --moe-extended-tp and ignore it.
    extended = args.get("moe_extended_tp") and "expert_tensor_parallel_size" not in args
    if extended and tensor * expert > 1 and args.get("num_experts"):
        raise UnsupportedModel(
            "experts were split over tensor x expert parallel ranks (--moe-extended-tp)",
            expected="moe_extended_tp false",
            found="true",
            remedy="load and save the checkpoint without --moe-extended-tp",
        )
    return grid


@dataclass(frozen=True)
class ShardFiles:
    """The rank files that are there, and which of them hold what.

    Attributes:
        dense: (pipeline, tensor) -> files with that shard of the dense parameters; equal copies, sorted.
        experts: (pipeline, expert, expert_tensor) -> files with that shard of the experts; equal copies, sorted.
    """

    dense: Mapping[tuple[int, int], tuple[str, ...]]
    experts: Mapping[tuple[int, int, int], tuple[str, ...]]


def find_shards(grid: Grid, present: Iterable[str]) -> ShardFiles:
    """Place the rank directories that are present in the grid.

    Args:
        grid: from the args.
        present: names of rank directories that hold a `model_optim_rng.pt`.

    Raises:
        MissingShard: a directory that the grid does not name, or a shard that no directory holds.
    """
    names = set(present)
    missing = missing_directories(grid, names)
    foreign = sorted(names - {rank_directory(grid, rank) for rank in grid_ranks(grid)})
    if foreign:
        raise MissingShard(
            "rank directories that the checkpoint's own args do not name",
            expected=f"the directories of {grid}" + (f", of which are missing: {_some(missing)}" if missing else ""),
            found=_some(foreign),
            remedy="two checkpoints may share this directory; leave the rank directories of one",
        )
    if missing:
        remedy = "copy the missing directories beside the others"
        if grid.expert_tensor < grid.tensor:
            remedy += (
                "; before Megatron-Core 0.18 a run with TP larger than EP x ETP never wrote some tensor parallel "
                "shards: then save again with a newer Megatron-Core"
            )
        raise MissingShard(
            f"{len(missing)} rank {'directory' if len(missing) == 1 else 'directories'} of {grid} missing",
            expected=f"{SHARD_FILE} in {_some(missing)}",
            found=_some(sorted(names)) or "none",
            remedy=remedy,
        )
    dense, experts = _holders(grid, names)
    return ShardFiles(dense, experts)


def grid_ranks(grid: Grid) -> list[Rank]:
    """Every rank that the grid can name; with ETP < TP training writes only some of them."""
    return [Rank(p, t, e) for p in range(grid.pipeline) for t in range(grid.tensor) for e in range(grid.expert)]


def _holders(
    grid: Grid, names: set[str]
) -> tuple[dict[tuple[int, int], tuple[str, ...]], dict[tuple[int, int, int], tuple[str, ...]]]:
    """Files by dense shard and by expert shard; the expert tensor rank is the tensor rank modulo ETP."""
    dense: dict[tuple[int, int], tuple[str, ...]] = {}
    experts: dict[tuple[int, int, int], tuple[str, ...]] = {}
    for rank in grid_ranks(grid):
        name = rank_directory(grid, rank)
        if name in names:
            file = f"{name}/{SHARD_FILE}"
            shard = (rank.pipeline, rank.tensor)
            expert_shard = (rank.pipeline, rank.expert, rank.tensor % grid.expert_tensor)
            dense[shard] = (*dense.get(shard, ()), file)
            experts[expert_shard] = (*experts.get(expert_shard, ()), file)
    return dense, experts


def missing_directories(grid: Grid, names: set[str]) -> list[str]:
    """Rank directories that are absent and whose shards no other directory holds."""
    dense, experts = _holders(grid, names)
    return [
        rank_directory(grid, rank)
        for rank in grid_ranks(grid)
        if (rank.pipeline, rank.tensor) not in dense
        or (rank.pipeline, rank.expert, rank.tensor % grid.expert_tensor) not in experts
    ]


def _some(names: list[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


@dataclass(frozen=True)
class Chunk:
    """A run of layers that one virtual pipeline stage holds.

    Attributes:
        pipeline: rank, the `_PPP` of the directory.
        virtual: number of `model{virtual}` in the file.
        first_layer: global number of its layer 0.
        layers: how many it holds, possibly none.
    """

    pipeline: int
    virtual: int
    first_layer: int
    layers: int


def place_chunks(grid: Grid, layers_of: Mapping[tuple[int, int], int]) -> tuple[Chunk, ...]:
    """Number the layers over all chunks, in the order in which a token meets them: by virtual stage, then pipeline.

    Args:
        grid: the parallel sizes.
        layers_of: (pipeline, virtual) -> layers counted in that chunk's keys. Counting serves even and uneven stages,
            embeddings that stand in for a layer, and explicit layouts alike.
    """
    chunks, first_layer = [], 0
    for virtual in range(grid.virtual_pipeline):
        for pipeline in range(grid.pipeline):
            layers = layers_of[pipeline, virtual]
            chunks.append(Chunk(pipeline, virtual, first_layer, layers))
            first_layer += layers
    return tuple(chunks)
