"""What each file of a Megatron target holds: names, dtypes and shapes, in the spelling that the user chose.

Facts: docs/formats.md, "Parameter names" and "Splitting over ranks".
"""

from collections.abc import Mapping, Sequence

from dist_convert.formats.megatron import names as megatron_names
from dist_convert.formats.megatron.grid import SHARD_FILE, Chunk, Grid, rank_directory, written_ranks
from dist_convert.formats.megatron.names import ExpertNumber
from dist_convert.formats.megatron.parameters import Parameter, parameter_of
from dist_convert.formats.megatron.target_args import TargetDialect
from dist_convert.models.schema import Architecture, Family, Row, entries
from dist_convert.records import TensorSpec


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
    chunk_of = {c.first_layer + n: c for c in chunks for n in range(c.layers)}
    specs: dict[tuple[Chunk, int], list[TensorSpec]] = {(c, rank): [] for c in chunks for rank in range(grid.expert)}
    for entry, layer, expert in entries(family, architecture):
        if not isinstance(entry, Row):
            continue
        parameter = parameter_of(entry, layer, expert, grid, whole_latents=dialect.norms == "transformer_engine")
        outermost = chunks[0] if entry in family.before else chunks[-1]
        chunk = outermost if layer is None else chunk_of[layer]
        found = _specs(parameter, architecture, grid, chunk, dialect, dtypes[parameter.name])
        for rank in range(grid.expert) if expert is None else (expert // (architecture.experts // grid.expert),):
            specs[chunk, rank] += found
    original, copy = megatron_names.TIED
    has_mtp = bool(architecture.fact("mtp_layers"))  # which reads the embedding on the last stage
    copy = original if has_mtp else copy
    if (architecture.tied or has_mtp) and chunks[-1] != chunks[0]:  # the last stage keeps a copy
        [embedding] = [spec for spec in specs[chunks[0], 0] if spec[0] == original]
        for rank in range(grid.expert):
            specs[chunks[-1], rank].append((copy, *embedding[1:]))
    in_stage = {
        stage: sorted((chunk for chunk in chunks if chunk.pipeline == stage), key=lambda chunk: chunk.virtual)
        for stage in range(grid.pipeline)
    }
    return {
        f"{rank_directory(grid, rank)}/{SHARD_FILE}": tuple(
            tuple(specs[chunk, rank.expert]) for chunk in in_stage[rank.pipeline]
        )
        for rank in written_ranks(grid)
    }


def _specs(
    parameter: Parameter, architecture: Architecture, grid: Grid, chunk: Chunk, dialect: TargetDialect, dtype: str
) -> list[TensorSpec]:
    layer = None if parameter.layer is None else parameter.layer - chunk.first_layer
    number = None
    if parameter.expert is not None:
        per_rank = architecture.experts // grid.expert
        number = ExpertNumber(parameter.expert, parameter.expert % per_rank, per_rank)
    spelling = megatron_names.spelling_for(
        megatron_names.spellings(parameter.row, layer, number),
        norms=dialect.norms,
        experts=dialect.experts,
    )
    rows, columns = parameter.shard_size(architecture)
    is_vector = len(parameter.row.parts[0].dims) == 1
    found = [piece for piece in spelling.pieces if piece.index == 0]  # stacked and grouped experts share one tensor
    names = [megatron_names.with_mtp_name(piece.name, dialect.mtp) for piece in found]
    shapes = [megatron_names.stored_shape(p, rows // p.parts, columns, is_vector=is_vector) for p in found]
    return [(name, dtype, shape) for name, shape in zip(names, shapes, strict=True)]
