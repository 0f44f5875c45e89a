"""Single elements of tensors, found in Megatron's files by a formula that knows neither regions nor boxes.

Both sides of a comparison, and the conversion before it, take the places of a tensor from one kind of catalog. If that
were wrong in the same way for reading and for writing, the copies would agree. So some elements of each tensor are
located once more, from the tables and the stored shapes alone, by what docs/formats.md says in "Attention and the
query-group interleave", "MLP and the gate-up interleave" and "Experts".
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from dist_convert.errors import PlanError
from dist_convert.formats.megatron.names import Piece
from dist_convert.formats.megatron.parameters import MegatronCatalog, Parameter, Replica
from dist_convert.formats.torch.catalog import TorchCatalog, files_of, stored_pieces
from dist_convert.models.catalog import Region
from dist_convert.models.schema import part_size
from dist_convert.records import DTYPE_BYTES, StoredTensor

#: Of each tensor, the first and the last among them.
_ELEMENTS = 64

#: The stored tensors that hold a shard in one file, see `stored_pieces`.
_Pieces = Sequence[tuple[Piece, StoredTensor]]


def check_elements(catalog: MegatronCatalog, names: Sequence[str]) -> None:
    """Check some elements of tensors as `check_tensor` does; those without a parameter are zeros."""
    for name in names:
        if name in catalog.parameters:
            meta = catalog.tensors[name]
            drawn = _drawn(name, meta.rows * meta.columns)
            check_tensor(catalog, name, (divmod(index, meta.columns) for index in drawn))


def check_tensor(catalog: MegatronCatalog, name: str, elements: Iterable[tuple[int, int]]) -> None:
    """Compare where a tensor's regions have elements, given by row and column, with where the formula has them.

    Raises:
        PlanError: they are two places, or a file that has the element is not among the regions'.
    """
    parameter, number = catalog.parameters[name]
    regions = catalog.regions(name)
    shards: dict[int, dict[str, _Pieces]] = {}
    for row, column in elements:
        shard, inside, across = shard_element(parameter, number, row, column)
        found = _in_regions(regions, row, column)
        if isinstance(catalog, TorchCatalog):
            if shard not in shards:
                files = files_of(catalog, parameter, shard)[: 1 if parameter.name in catalog.pinned else None]
                shards[shard] = {file: stored_pieces(catalog, parameter, file) for file in files}
            per_rank = max(1, catalog.architecture.experts // catalog.grid.expert)
            at = (parameter.expert or 0) % per_rank, inside, across
            size = parameter.cut.shard_size
            places = {file: _offset_bytes(pieces, *size, *at) for file, pieces in shards[shard].items()}
        else:
            places = _in_chunks(catalog.replicas[parameter.name][0][0], inside, across)
        for file, expected in places.items():
            if expected not in found.get(file, []):
                raise PlanError(
                    f"element [{row}, {column}] was not taken from its place in Megatron's layout",
                    file,
                    tensor=name,
                    expected=f"byte {expected}",
                    found=f"byte {', '.join(map(str, found.get(file, []))) or 'nowhere'}",
                    remedy="this is a bug in dist_convert: please report it, and do not use the result",
                )


def _in_chunks(replica: Replica, row: int, column: int) -> dict[str, int]:
    """Where an element of a parameter lies that is stored in boxes: file -> byte."""
    for first_row, first_column, v in replica:
        down, right = row - first_row, column - first_column
        if 0 <= down < v.rows and 0 <= right < v.columns:
            elements = down * v.row_stride + right * v.column_stride
            return {v.file: v.offset_bytes + elements * DTYPE_BYTES[v.dtype]}
    raise PlanError("an element beyond its parameter", found=(row, column))


def _in_regions(regions: Sequence[Region], row: int, column: int) -> dict[str, list[int]]:
    """Where a catalog has an element: file -> bytes; a copy that a tied model keeps may be in the same file."""
    found: dict[str, list[int]] = {}
    for region in regions:
        down, right = row - region.box.row, column - region.box.column
        if 0 <= down < region.box.rows and 0 <= right < region.box.columns:
            for view in region.replicas:
                found.setdefault(view.file, []).append(view.offset_at(down, right))
    return found


def shard_element(parameter: Parameter, number: int, row: int, column: int) -> tuple[int, int, int]:
    """The shard that holds an element of the `number`-th tensor of a parameter, and its row and column in the shard."""
    table, shards, sizes = parameter.row, parameter.shards, parameter.cut.sizes
    if table.split == "replicated":
        return 0, row, column
    if table.split == "columns":
        width = part_size(table.parts[number], sizes)[1] // shards
        return column // width, row, column % width
    turns = 1
    if table.by_query_group:
        turns = sizes["query_groups"]
    elif parameter.cut.is_per_shard and len(table.parts) > 1:
        turns = shards
    heights = [part_size(part, sizes)[0] // turns for part in table.parts]  # of each tensor in a turn
    turn, within = divmod(row, heights[number])
    stacked_rows = sizes[table.padded_rows] if table.padded_rows else turns * sum(heights)
    shard, inside = divmod(turn * sum(heights) + sum(heights[:number]) + within, stacked_rows // shards)
    return shard, inside, column


def _offset_bytes(pieces: _Pieces, shard_rows: int, columns: int, expert: int, row: int, column: int) -> int:
    """Where an element of a shard lies in its file: of one of the pieces that hold it, of an expert of its rank."""
    for piece, stored in pieces:
        rows = shard_rows // piece.parts
        if row // rows == piece.part:
            at = row - piece.part * rows
            if piece.storage == "grouped":  # memory is [expert][column][row]
                elements = (expert * columns + column) * rows + at
            else:
                index = {"plain": (at, column), "transposed": (column, at), "stacked": (expert, at, column)}
                used = index[piece.storage][: len(stored.shape)]
                elements = sum(i * stride for i, stride in zip(used, stored.strides, strict=True))
            return stored.offset_bytes + elements * DTYPE_BYTES[stored.dtype]
    raise PlanError("a row beyond its shard", found=row)


def _drawn(name: str, elements: int) -> Iterator[int]:
    """Numbers of elements: the first, the last, and others by a hash, the same in every run."""
    yield from {0, elements - 1}
    digest = hashlib.shake_256(name.encode()).digest(8 * (_ELEMENTS - 2))
    yield from (int.from_bytes(digest[at : at + 8], "big") % elements for at in range(0, len(digest), 8))
