"""What each file of a Megatron target holds: names, dtypes and shapes, in the spelling that the user chose.

Facts: docs/formats.md, "Parameter names" and "Splitting over ranks".
"""

from dataclasses import replace

from dist_convert.formats.megatron import names as megatron_names
from dist_convert.formats.megatron.geometry import CutRow
from dist_convert.formats.megatron.grid import SHARD_FILE, Chunk, layer_chunks, rank_directory, written_ranks
from dist_convert.formats.megatron.names import Numbers, Piece
from dist_convert.formats.megatron.parameters import parameters_of
from dist_convert.formats.megatron.target import MegatronTarget
from dist_convert.formats.megatron.target_args import TargetDialect
from dist_convert.models import FAMILIES
from dist_convert.records import TensorSpec


def lay_out_shards(target: MegatronTarget) -> dict[str, tuple[tuple[TensorSpec, ...], ...]]:
    """The tensors of every rank file, by file and virtual stage, in the order of Megatron's own state dicts."""
    architecture, settings = target.architecture, target.settings
    grid, chunks, dialect = settings.grid, settings.chunks, settings.dialect
    has_mtp = bool(architecture.fact("mtp_layers"))
    before, chunk_of_layer = FAMILIES[architecture.family].before, layer_chunks(chunks)
    per_rank = max(1, architecture.experts // grid.expert)
    specs: dict[tuple[Chunk, int], list[TensorSpec]] = {(c, rank): [] for c in chunks for rank in range(grid.expert)}
    written: dict[int, list[tuple[Piece, tuple[int, ...]]]] = {}  # of each row, for all layers and experts
    for parameter in parameters_of(architecture, grid, whole_latents=dialect.norms == "transformer_engine"):
        cut, layer, expert = parameter.cut, parameter.layer, parameter.expert
        if id(cut) not in written:
            written[id(cut)] = _pieces(cut, per_rank, dialect)
        if layer is not None:
            chunk = chunk_of_layer[layer]
        elif megatron_names.is_of_mtp(parameter.name):
            chunk = target.mtp_chunk
        elif cut.row.is_norm and has_mtp:  # the last one, which Megatron-Core then has behind the last layer
            chunk = chunk_of_layer[-1]
        else:
            chunk = chunks[0] if cut.row in before else chunks[-1]
        rank, local = divmod(expert or 0, per_rank)
        numbers = Numbers(None if layer is None else layer - chunk.first_layer, expert, local)
        dtype = target.dtypes[parameter.name]
        # Stacked and grouped experts share one tensor.
        listed = [one for one in written[id(cut)] if not local or one[0].storage in ("plain", "transposed")]
        found = [(numbers.named(piece.name), dtype, shape) for piece, shape in listed]
        for holding in range(grid.expert) if expert is None else (rank,):
            specs[chunk, holding] += found
    original, copy = megatron_names.TIED
    # Layers of multi-token prediction read the embedding; the last stage of a tied model has it as its head.
    copy, holder = (original, target.mtp_chunk) if has_mtp else (copy, chunks[-1])
    if (architecture.tied or has_mtp) and holder != chunks[0]:
        [embedding] = [spec for spec in specs[chunks[0], 0] if spec[0] == original]
        for rank in range(grid.expert):
            specs[holder, rank].append((copy, *embedding[1:]))
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


def _pieces(cut: CutRow, per_rank: int, dialect: TargetDialect) -> list[tuple[Piece, tuple[int, ...]]]:
    """What is stored of each parameter of a row, with templates of names, and the shapes."""
    spelling = megatron_names.spelling_for(cut.spellings, norms=dialect.norms, experts=dialect.experts)
    rows, columns = cut.shard_size
    is_vector = len(cut.row.parts[0].dims) == 1
    return [
        (
            replace(piece, name=megatron_names.with_mtp_name(piece.name, dialect.mtp)),
            megatron_names.stored_shape(piece, rows // piece.parts, columns, per_rank, is_vector=is_vector),
        )
        for piece in spelling.pieces
    ]
