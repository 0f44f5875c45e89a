"""A conversion as moves, all box copies of one parameter, and moves cut into blocks, the smallest pieces of work.

Copies are expanded from the tables only when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from dist_convert.errors import ConversionError, InconsistentShards, PlanError, raise_together
from dist_convert.plan.megatron import (
    MegatronSide,
    Parameter,
    Replica,
    parameters,
    part_size,
    replicas,
    segments,
    shard_size,
    tied_replicas,
)
from dist_convert.records import DTYPE_BYTES, Block, Box, Copy, View, cover_fault, intersect, tiles


@dataclass(frozen=True)
class Sides:
    """What lies at the two ends of every copy, and which end is the source.

    Attributes:
        megatron: the Megatron checkpoint, read or to be written.
        to_megatron: whether it is the target.
        add_to_norms: 1 where norms are stored as gamma - 1 and read, else 0.
        repeat_last_row: fill the padding rows of a target's vocabulary with the last real row, not with zeros.
    """

    megatron: MegatronSide
    to_megatron: bool = False
    add_to_norms: int = 0
    repeat_last_row: bool = False


@dataclass(frozen=True)
class Move:
    """All copies of one parameter.

    Attributes:
        parameter: the Megatron end.
        hf: the Hugging Face tensors that it is stacked from, in the order of the row's parts, as rows x columns.
        stored: for each shard, where its equal copies are stored.
        size_bytes: of the copies, in the target's dtype, counting equal targets once.
        written_bytes: the same, counting every equal target.
        homes: for each piece of the source, the files that hold it (equal copies).
        targets: the files that the parameter is written to.
        needs: sets of files; ranks can do the move together if they reach one file of each.
        own_targets: the same of target files that not every rank can write, as far as `needs` does not say it.
        is_part: other moves write the parameter to further files; this one has what goes to `targets`.
    """

    parameter: Parameter
    hf: tuple[View, ...]
    stored: tuple[tuple[Replica, ...], ...]
    size_bytes: int
    written_bytes: int
    homes: tuple[tuple[str, ...], ...]
    targets: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...]
    own_targets: tuple[tuple[str, ...], ...] = ()
    is_part: bool = False

    @property
    def all_needs(self) -> tuple[tuple[str, ...], ...]:
        """All that ranks must reach to do the move."""
        return (*self.needs, *self.own_targets)


def plan_moves(sides: Sides, hf: Mapping[str, View]) -> tuple[Move, ...]:
    """One move for each parameter, in table order.

    Args:
        sides: both ends.
        hf: every Hugging Face tensor by name.

    Raises:
        PlanError: two parameters are stacked from the same Hugging Face tensor.
    """
    moves = []
    taken: set[str] = set()
    for parameter in parameters(sides.megatron):
        names = [part.name.format(layer=parameter.layer, expert=parameter.expert) for part in parameter.row.parts]
        for name in names:
            if name in taken:
                raise PlanError("two rows of the table name one tensor", tensor=name, found=parameter.name)
            taken.add(name)
        views = tuple(hf[name] for name in names)
        stored = _equal_copies(sides, parameter)
        shard_files = tuple(tuple(replica[0][1].file for replica in shard) for shard in stored)
        hf_files = tuple(dict.fromkeys(view.file for view in views))
        elements = sum(view.rows * view.columns for view in views)
        if sides.to_megatron:
            elements += sum(box.elements for _, box in _padding(sides.megatron, parameter)) * sides.repeat_last_row
            item_bytes = DTYPE_BYTES[stored[0][0][0][1].dtype]
            written_bytes = sum(v.size_bytes for shard in stored for replica in shard for _, v in replica)
            if not sides.repeat_last_row:
                padding = [(shard, box) for shard, box in _padding(sides.megatron, parameter)]
                written_bytes -= sum(box.elements * len(stored[shard]) for shard, box in padding) * item_bytes
            targets = tuple(dict.fromkeys(file for files in shard_files for file in files))
            homes = tuple((file,) for file in hf_files)
            needs = (*homes, *((file,) for file in targets))
            moves.append(Move(parameter, views, stored, elements * item_bytes, written_bytes, homes, targets, needs))
        else:
            # Hugging Face files lie where every rank writes them, unless `file_owners` says otherwise.
            size_bytes = elements * DTYPE_BYTES[views[0].dtype]
            moves.append(Move(parameter, views, stored, size_bytes, size_bytes, shard_files, hf_files, shard_files))
    return tuple(moves)


def copies(sides: Sides, move: Move) -> Iterator[Copy]:
    """All copies of a move, ordered by shard and row; of a part of a move, those of the whole.

    Args:
        sides: both ends.
        move: one of `plan_moves(sides, ...)`.

    Raises:
        InconsistentShards: equal copies of a shard are stored in different pieces.
    """
    parameter, stored = move.parameter, move.stored
    add = sides.add_to_norms if parameter.row.is_norm else 0
    for segment in segments(parameter.row, sides.megatron.architecture.sizes(), parameter.shards):
        hf = move.hf[segment.part].window(segment.hf)
        for box, views in _megatron_views(parameter, segment.megatron, stored[segment.shard]):
            yield Copy((hf.window(box),), views, add) if sides.to_megatron else Copy(views, (hf.window(box),), add)
    if sides.to_megatron and sides.repeat_last_row:
        last = move.hf[0].window(Box(move.hf[0].rows - 1, 0, 1, move.hf[0].columns))
        for shard, padding in _padding(sides.megatron, parameter):
            for box, views in _megatron_views(parameter, padding, stored[shard]):
                yield Copy((replace(last, rows=box.rows, row_stride=0),), views)


def _equal_copies(sides: Sides, parameter: Parameter) -> tuple[tuple[Replica, ...], ...]:
    """Every shard's equal copies; a target's tied embedding has some on the last stage as well."""
    side, shards = sides.megatron, range(parameter.shards)
    more = [tied_replicas(side, parameter, shard) if sides.to_megatron else () for shard in shards]
    return tuple(replicas(side, parameter, shard) + more[shard] for shard in shards)


def _padding(side: MegatronSide, parameter: Parameter) -> Iterator[tuple[int, Box]]:
    """The rows of each shard that no row of the Hugging Face tensor fills."""
    if parameter.row.padded_rows is None:
        return
    sizes = side.architecture.sizes()
    rows, columns = shard_size(parameter.row, sizes, parameter.shards)
    real_rows = part_size(parameter.row.parts[0], sizes)[0]
    for shard in range(parameter.shards):
        first = min(rows, max(0, real_rows - shard * rows))
        if first < rows:
            yield shard, Box(first, 0, rows - first, columns)


def _megatron_views(
    parameter: Parameter, wanted: Box, stored: tuple[Replica, ...]
) -> Iterator[tuple[Box, tuple[View, ...]]]:
    """The parts of a shard's box that lie in one stored piece each (counted from the box), with all replicas' views."""
    for number, (first_row, view) in enumerate(stored[0]):
        inside = intersect(wanted, Box(first_row, 0, view.rows, view.columns))
        if inside is None:
            continue
        if any(len(replica) != len(stored[0]) for replica in stored):
            raise InconsistentShards("equal copies are stored in different layouts", tensor=parameter.name)
        window = Box(inside.row - first_row, inside.column, inside.rows, inside.columns)
        views = tuple(replica[number][1].window(window) for replica in stored)
        yield Box(inside.row - wanted.row, inside.column - wanted.column, inside.rows, inside.columns), views


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
    if any(segment.shard >= parameter.shards for segment in listed):
        yield "rows lie beyond the last shard"
    for number, part in enumerate(parameter.row.parts):
        yield cover_fault((s.hf for s in listed if s.part == number), *part_size(part, sizes))
    rows, columns = shard_size(parameter.row, sizes, parameter.shards)
    padding = dict(_padding(side, parameter))
    for shard in range(parameter.shards):
        boxes = [s.megatron for s in listed if s.shard == shard]
        yield cover_fault(boxes + ([padding[shard]] if shard in padding else []), rows, columns)


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
