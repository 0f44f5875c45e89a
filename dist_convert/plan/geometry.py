"""Where each Hugging Face tensor lies inside the shards of the Megatron parameter that it is stacked into.

Pure integers. Facts: docs/formats.md, "Attention and the query-group interleave" and "MLP and the gate-up interleave".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dist_convert.boxes import Box, intersect
from dist_convert.errors import PlanError
from dist_convert.models.schema import Part, Row


@dataclass(frozen=True)
class Segment:
    """A box of a Hugging Face tensor and the equal box of a Megatron shard.

    Attributes:
        part: number of the Hugging Face tensor in the row's parts.
        hf: box in that tensor.
        shard: number of the shard along the row's split.
        megatron: box in that shard.
    """

    part: int
    hf: Box
    shard: int
    megatron: Box


def part_shape(part: Part, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Elements per dimension of a Hugging Face tensor."""
    return tuple(sizes[dim] for dim in part.dims)


def part_size(part: Part, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Rows and columns of a Hugging Face tensor; a vector has one column."""
    shape = part_shape(part, sizes)
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def shard_count(row: Row, tensor_parallel: int) -> int:
    """How many different shards a parameter has on a grid of that (expert) tensor parallel size."""
    return 1 if row.split == "replicated" else tensor_parallel


def shard_size(row: Row, sizes: Mapping[str, int], shards: int) -> tuple[int, int]:
    """Rows and columns of each shard of a Megatron parameter.

    Raises:
        PlanError: the parameter cannot be cut into that many equal shards.
    """
    rows = sum(part_size(part, sizes)[0] for part in row.parts)
    rows = sizes[row.padded_rows] if row.padded_rows else rows
    columns = part_size(row.parts[0], sizes)[1]
    length = {"rows": rows, "columns": columns, "replicated": shards}[row.split]
    uneven = row.interleave == "shards" and any(part_size(part, sizes)[0] % shards for part in row.parts)
    if length % shards or uneven:
        raise PlanError(
            f"cannot be cut into {shards} equal shards",
            tensor=row.megatron,
            expected=f"a multiple of {shards} {row.split}",
            found=" + ".join(f"{part_size(part, sizes)[0]}" for part in row.parts) + f" rows, {columns} columns",
            remedy="the tensor parallel size in the checkpoint's args does not belong to this model",
        )
    return (
        rows // shards if row.split == "rows" else rows,
        columns // shards if row.split == "columns" else columns,
    )


def segments(row: Row, sizes: Mapping[str, int], shards: int) -> Iterator[Segment]:
    """All boxes of a parameter, in the order of the Megatron shards' rows.

    Column-split parameters share their row range, so that their boxes can be joined to whole rows.
    """
    shard_rows, shard_columns = shard_size(row, sizes, shards)
    if row.split != "rows":
        rows, _ = part_size(row.parts[0], sizes)
        for shard in range(shards):
            box = Box(0, shard * shard_columns, rows, shard_columns)
            yield Segment(0, box, shard, Box(0, 0, rows, shard_columns))
        return
    blocks = {"shards": shards, "query_groups": sizes["query_groups"], "none": 1}[row.interleave]
    rows_of_parts = [part_size(part, sizes)[0] // blocks for part in row.parts]
    stacked_row = 0
    for block in range(blocks):
        for number, rows in enumerate(rows_of_parts):
            yield from _cut(number, block * rows, stacked_row, rows, shard_rows, shard_columns)
            stacked_row += rows


def _cut(part: int, hf_row: int, stacked_row: int, rows: int, shard_rows: int, columns: int) -> Iterator[Segment]:
    """Cut rows of the stacked parameter at the shards' borders (a query group may lie in two shards)."""
    whole = Box(stacked_row, 0, rows, columns)
    for shard in range(stacked_row // shard_rows, (stacked_row + rows - 1) // shard_rows + 1):
        common = intersect(whole, Box(shard * shard_rows, 0, shard_rows, columns))
        if common is not None:
            hf = Box(hf_row + common.row - stacked_row, 0, common.rows, columns)
            yield Segment(part, hf, shard, Box(common.row - shard * shard_rows, 0, common.rows, columns))
