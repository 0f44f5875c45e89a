"""What each file of a Megatron target holds: names, dtypes and shapes, in the spelling that the user chose.

Facts: docs/formats.md, "Parameter names" and "Splitting over ranks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_convert.formats.megatron import names as megatron_names
from dist_convert.formats.megatron.grid import SHARD_FILE, Chunk, Grid, Rank, rank_directory
from dist_convert.formats.megatron.names import ExpertNumber
from dist_convert.models.schema import Architecture, Family, Row
from dist_convert.plan.megatron import Parameter, entries, shard_count, shard_size
from dist_convert.records import TensorSpec


@dataclass(frozen=True)
class TargetDialect:
    """Spelling of a target: of its norms ("local", "transformer_engine", "habana"), and of its experts."""

    norms: str = "transformer_engine"
    experts: str = "sequential"


def written_ranks(grid: Grid) -> list[Rank]:
    """The ranks whose files exist: with ETP < TP only some pairs of tensor and expert rank occur in a stage."""
    in_stage = math.lcm(grid.tensor, grid.expert_tensor * grid.expert)
    pairs = dict.fromkeys((r % grid.tensor, r // grid.expert_tensor % grid.expert) for r in range(in_stage))
    return [Rank(pipeline, tensor, expert) for pipeline in range(grid.pipeline) for tensor, expert in sorted(pairs)]


def lay_out_shards(
    architecture: Architecture,
    family: Family,
    grid: Grid,
    chunks: Sequence[Chunk],
    dialect: TargetDialect,
    dtypes: Mapping[str, str],
) -> dict[str, tuple[tuple[TensorSpec, ...], ...]]:
    """The tensors of every rank file, by file and virtual stage, in the order of Megatron's own state dicts.

    Args:
        architecture, family, grid: what is written, and how it is split.
        chunks: where the layers go, in the order in which a token meets them.
        dialect: how norms and experts are spelled.
        dtypes: safetensors name of each parameter's dtype, by canonical name.
    """
    listed = [
        Parameter(entry, layer, expert, shard_count(entry, grid.tensor if expert is None else grid.expert_tensor))
        for entry, layer, expert in entries(family, architecture)
        if isinstance(entry, Row)
    ]
    files = {}
    for rank in written_ranks(grid):
        name = f"{rank_directory(grid, rank)}/{SHARD_FILE}"
        files[name] = tuple(
            tuple(
                spec
                for parameter in listed
                if _is_in(parameter, family, chunk, chunks, rank, architecture, grid)
                for spec in _specs(parameter, architecture, grid, chunk, dialect, dtypes[parameter.name])
            )
            + (
                _tied_copy(listed[0], architecture, dtypes)
                if architecture.tied and chunk == chunks[-1] != chunks[0]
                else ()
            )
            for chunk in sorted(chunks, key=lambda chunk: chunk.virtual)
            if chunk.pipeline == rank.pipeline
        )
    return files


def _is_in(
    parameter: Parameter,
    family: Family,
    chunk: Chunk,
    chunks: Sequence[Chunk],
    rank: Rank,
    architecture: Architecture,
    grid: Grid,
) -> bool:
    if parameter.layer is None:
        return chunk == (chunks[0] if parameter.row in family.before else chunks[-1])
    inside = chunk.first_layer <= parameter.layer < chunk.first_layer + chunk.layers
    return inside and (
        parameter.expert is None or parameter.expert // (architecture.experts // grid.expert) == rank.expert
    )


def _specs(
    parameter: Parameter, architecture: Architecture, grid: Grid, chunk: Chunk, dialect: TargetDialect, dtype: str
) -> list[TensorSpec]:
    layer = None if parameter.layer is None else parameter.layer - chunk.first_layer
    number = None
    if parameter.expert is not None:
        per_rank = architecture.experts // grid.expert
        number = ExpertNumber(parameter.expert, parameter.expert % per_rank, per_rank)
    spelling = megatron_names.spelling_for(
        megatron_names.spellings(parameter.row.megatron, layer, number),
        norms=dialect.norms,
        experts=dialect.experts,
        has_experts=architecture.experts > 0,
    )
    rows, columns = shard_size(parameter.row, architecture.sizes(), parameter.shards)
    is_vector = len(parameter.row.parts[0].dims) == 1
    return [
        (piece.name, dtype, megatron_names.stored_shape(piece, rows // piece.parts, columns, is_vector=is_vector))
        for piece in spelling.pieces
        if piece.index == 0  # stacked and grouped experts share one tensor
    ]


def _tied_copy(embedding: Parameter, architecture: Architecture, dtypes: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    """The last stage's copy of the embedding, which Megatron keeps where both are tied and apart."""
    original, copy = megatron_names.TIED
    if embedding.name != original:
        raise AssertionError("the embedding comes first in every table")
    return ((copy, dtypes[original], shard_size(embedding.row, architecture.sizes(), embedding.shards)),)
