"""A conversion as moves: all box copies of one parameter, expanded from the tables only when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dist_convert.boxes import Box, cover_fault, intersect, tiles
from dist_convert.errors import ConversionError, InconsistentShards, PlanError, raise_together
from dist_convert.plan.geometry import Segment, part_size, segments, shard_size
from dist_convert.plan.source import MegatronSide, Parameter, Replica, parameters, replicas
from dist_convert.records import DTYPE_BYTES, Block, Copy, StoredTensor, View

#: Bytes of one block, the smallest piece of work. Fixed, so that results never depend on ranks or budget.
BLOCK_BYTES = 4 << 20

#: Columns of a tile where source and target lie transposed to each other: runs of 2 KiB on both sides.
_TILE_COLUMNS = 1024


@dataclass(frozen=True)
class Move:
    """All copies of one parameter.

    Attributes:
        parameter: the Megatron side.
        hf: the Hugging Face tensors that it is stacked from, in the order of the row's parts.
        size_bytes: of the Hugging Face tensors.
        homes: for each shard, the files that hold it (equal copies).
    """

    parameter: Parameter
    hf: tuple[StoredTensor, ...]
    size_bytes: int
    homes: tuple[tuple[str, ...], ...]


def plan_moves(side: MegatronSide, hf: Mapping[str, StoredTensor]) -> tuple[Move, ...]:
    """One move for each parameter, in table order.

    Args:
        side: the Megatron checkpoint.
        hf: every Hugging Face tensor by name.
    """
    moves = []
    for parameter in parameters(side):
        tensors = tuple(
            hf[part.name.format(layer=parameter.layer, expert=parameter.expert)] for part in parameter.row.parts
        )
        homes = tuple(
            tuple(replica[0][1].file for replica in replicas(side, parameter, shard))
            for shard in range(parameter.shards)
        )
        moves.append(Move(parameter, tensors, sum(tensor.size_bytes for tensor in tensors), homes))
    return tuple(moves)


def _hf_view(tensor: StoredTensor) -> View:
    rows, columns = (tensor.shape[0], tensor.shape[1]) if len(tensor.shape) == 2 else (tensor.shape[0], 1)
    return View(tensor.file, tensor.name, tensor.dtype, tensor.offset_bytes, rows, columns, columns, 1)


def copies(side: MegatronSide, move: Move, *, add_to_norms: int) -> Iterator[Copy]:
    """All copies of a move, from Megatron to Hugging Face, ordered by shard and row.

    Args:
        side: the Megatron checkpoint.
        move: one of `plan_moves(side, ...)`.
        add_to_norms: 1 where norms are stored as gamma - 1, else 0.

    Raises:
        InconsistentShards: equal copies of a shard are stored in different pieces.
    """
    parameter = move.parameter
    stored = [replicas(side, parameter, shard) for shard in range(parameter.shards)]
    add = add_to_norms if parameter.row.is_norm else 0
    for segment in segments(parameter.row, side.architecture.sizes(), parameter.shards):
        hf = _hf_view(move.hf[segment.part]).window(segment.hf)
        for box, views in _megatron_views(parameter, segment, stored[segment.shard]):
            yield Copy(views, (hf.window(box),), add)


def _megatron_views(
    parameter: Parameter, segment: Segment, stored: tuple[Replica, ...]
) -> Iterator[tuple[Box, tuple[View, ...]]]:
    """The parts of a segment that lie in one stored piece each, with that piece's views in all replicas."""
    for number, (first_row, view) in enumerate(stored[0]):
        inside = intersect(segment.megatron, Box(first_row, 0, view.rows, view.columns))
        if inside is None:
            continue
        if any(len(replica) != len(stored[0]) for replica in stored):
            raise InconsistentShards("equal copies are stored in different layouts", tensor=parameter.name)
        window = Box(inside.row - first_row, inside.column, inside.rows, inside.columns)
        views = tuple(replica[number][1].window(window) for replica in stored)
        box = Box(
            inside.row - segment.megatron.row, inside.column - segment.megatron.column, inside.rows, inside.columns
        )
        yield box, views


def check_cover(side: MegatronSide, moves: tuple[Move, ...]) -> None:
    """Check that every move writes its Hugging Face tensors, and reads its shards, exactly once each.

    What a shard holds beyond the copies must be padding rows of the vocabulary.

    Raises:
        Problems, or the one PlanError there is.
    """
    problems: list[ConversionError] = []
    checked: dict[tuple[int, int], tuple[str | None, ...]] = {}
    for move in moves:
        # Layers and experts repeat the geometry of a row, which depends on nothing else.
        key = (id(move.parameter.row), move.parameter.shards)
        if key not in checked:
            checked[key] = tuple(_cover_faults(side, move))
        problems += [
            PlanError("the plan does not cover a tensor exactly", tensor=move.parameter.name, found=fault)
            for fault in checked[key]
            if fault is not None
        ]
    raise_together(problems)


def _cover_faults(side: MegatronSide, move: Move) -> Iterator[str | None]:
    parameter, sizes = move.parameter, side.architecture.sizes()
    listed = list(segments(parameter.row, sizes, parameter.shards))
    for number, part in enumerate(parameter.row.parts):
        yield cover_fault((s.hf for s in listed if s.part == number), *part_size(part, sizes))
    rows, columns = shard_size(parameter.row, sizes, parameter.shards)
    for shard in range(parameter.shards):
        boxes = [s.megatron for s in listed if s.shard == shard]
        if parameter.row.padded_rows:
            kept = max((box.row_end for box in boxes), default=0)
            boxes.append(Box(kept, 0, rows - kept, columns))
        yield cover_fault([box for box in boxes if box.rows], rows, columns)


def blocks(side: MegatronSide, move: Move, *, add_to_norms: int) -> Iterator[Block]:
    """A move cut into blocks of about `BLOCK_BYTES`: copies that make up whole rows together stay together."""
    listed = tuple(copies(side, move, add_to_norms=add_to_norms))
    bands = (listed,) if move.parameter.row.split == "columns" else tuple((copy,) for copy in listed)
    for band in bands:
        if any(view.is_transposed for copy in band for view in copy.sources):
            yield from ((copy.window(tile),) for copy in band for tile in _square_tiles(copy))
        else:
            yield from _row_blocks(band)


def _square_tiles(copy: Copy) -> Iterator[Box]:
    columns = min(copy.columns, _TILE_COLUMNS)
    row_bytes = columns * _widest_item_bytes(copy)
    return tiles(copy.rows, copy.columns, max(1, BLOCK_BYTES // row_bytes), columns)


def _row_blocks(band: Block) -> Iterator[Block]:
    columns = sum(copy.columns for copy in band)
    row_bytes = columns * max(_widest_item_bytes(copy) for copy in band)
    if row_bytes > BLOCK_BYTES:
        raise PlanError(
            "a row is larger than a block",
            tensor=band[0].targets[0].tensor,
            expected=f"at most {BLOCK_BYTES} bytes",
            found=f"{row_bytes} bytes",
        )
    for tile in tiles(band[0].rows, 1, BLOCK_BYTES // row_bytes, 1):
        yield tuple(copy.window(Box(tile.row, 0, tile.rows, copy.columns)) for copy in band)


def _widest_item_bytes(copy: Copy) -> int:
    return max(DTYPE_BYTES[view.dtype] for view in (*copy.sources, *copy.targets))
