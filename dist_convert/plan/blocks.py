"""A move cut into blocks, the smallest pieces of work."""

from __future__ import annotations

from collections.abc import Iterator

from dist_convert.boxes import Box, tiles
from dist_convert.errors import PlanError
from dist_convert.plan.moves import Move, Sides, copies
from dist_convert.records import DTYPE_BYTES, Block, Copy

#: Bytes of one block. Fixed, so that results never depend on ranks or budget.
BLOCK_BYTES = 4 << 20

#: Columns of a tile where source and target lie transposed to each other: runs of 2 KiB on both sides.
_TILE_COLUMNS = 1024


def bands(sides: Sides, move: Move) -> Iterator[Block]:
    """The copies of a whole move that are cut together: all of them where they lie side by side, else one by one."""
    listed = tuple(copies(sides, move))
    if move.parameter.row.split == "columns":
        yield listed
    else:
        yield from ((copy,) for copy in listed)


def part_of(move: Move, band: Block) -> Block:
    """What a move has of a band or block of the whole move, which may be nothing."""
    if not move.is_part:
        return band
    kept = (copy.into(move.targets) for copy in band)
    return tuple(copy for copy in kept if copy.targets)


def blocks_of_band(move: Move, band: Block) -> Iterator[Block]:
    """One of a move's `bands` cut into blocks of about `BLOCK_BYTES`: copies that make up whole rows stay together.

    The blocks of a part of a move are those of the whole, with fewer targets: their borders are the same.
    """
    for block in _blocks_of_whole(band):
        if kept := part_of(move, block):
            yield kept


def _blocks_of_whole(band: Block) -> Iterator[Block]:
    if any(view.is_transposed for copy in band for view in (*copy.sources, *copy.targets)):
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
