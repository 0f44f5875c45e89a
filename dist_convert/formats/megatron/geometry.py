"""Where each tensor lies inside the shards of the Megatron parameter that it is stacked into. Integers only.

Facts: docs/formats.md, "Attention and the query-group interleave" and "MLP and the gate-up interleave".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dist_convert.errors import PlanError
from dist_convert.models.schema import Row, part_size
from dist_convert.records import Box, cover_fault


@dataclass(frozen=True)
class ShardBox:
    """A box of a tensor, the number of the shard that holds it, and the equal box of that shard."""

    box: Box
    shard: int
    inside: Box


def shard_count(row: Row, tensor_parallel: int) -> int:
    """How many different shards a parameter has on a grid of that (expert) tensor parallel size."""
    return 1 if row.split == "replicated" else tensor_parallel


def _turns(row: Row, sizes: Mapping[str, int], shards: int, *, is_per_shard: bool) -> int:
    """How often the rows of a parameter's tensors follow each other."""
    if row.by_query_group:
        return sizes["query_groups"]
    return shards if is_per_shard and row.split == "rows" and len(row.parts) > 1 else 1


def shard_size(row: Row, sizes: Mapping[str, int], shards: int, *, is_per_shard: bool = True) -> tuple[int, int]:
    """Rows and columns of each shard of a Megatron parameter; the arguments are those of `shard_boxes`.

    Raises:
        PlanError: the parameter cannot be cut into that many equal shards.
    """
    rows = sum(part_size(part, sizes)[0] for part in row.parts)
    rows = sizes[row.padded_rows] if row.padded_rows else rows
    columns = part_size(row.parts[0], sizes)[1]
    length = {"rows": rows, "columns": columns, "replicated": shards}[row.split]
    turns = _turns(row, sizes, shards, is_per_shard=is_per_shard)
    uneven = not row.by_query_group and any(part_size(part, sizes)[0] % turns for part in row.parts)
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


def shard_boxes(
    row: Row, part: int, sizes: Mapping[str, int], shards: int, *, is_per_shard: bool = True
) -> Iterator[ShardBox]:
    """Every box of one tensor of a parameter, in the order of its rows, or of its columns where those are cut.

    Args:
        row: of the table.
        part: number of the tensor in the row's parts.
        sizes: see `Architecture.sizes`.
        shards: different shards of the parameter.
        is_per_shard: tensors that are stacked and cut in rows are cut first and stacked in each shard, as Megatron does
            with gate and up, and not stacked first. Where they alternate by query groups it makes no difference.
    """
    rows, columns = part_size(row.parts[part], sizes)
    shard_rows, shard_columns = shard_size(row, sizes, shards, is_per_shard=is_per_shard)
    if row.split != "rows":
        for shard in range(shards):
            box = Box(0, shard * shard_columns, rows, shard_columns)
            yield ShardBox(box, shard, Box(0, 0, rows, shard_columns))
        return
    turns = _turns(row, sizes, shards, is_per_shard=is_per_shard)
    heights = [part_size(other, sizes)[0] // turns for other in row.parts]
    for turn in range(turns):
        stacked_row, end = turn * sum(heights) + sum(heights[:part]), turn * sum(heights) + sum(heights[: part + 1])
        tensor_row = turn * heights[part]
        while stacked_row < end:  # a query group may lie in two shards
            shard, inside = divmod(stacked_row, shard_rows)
            count = min(end - stacked_row, shard_rows - inside)
            yield ShardBox(Box(tensor_row, 0, count, columns), shard, Box(inside, 0, count, columns))
            stacked_row, tensor_row = stacked_row + count, tensor_row + count


def padding_boxes(row: Row, sizes: Mapping[str, int], shards: int) -> Iterator[ShardBox]:
    """The rows of each shard behind the last one of the only tensor, as the tensor's rows would go on."""
    if row.padded_rows is None:
        return
    rows, columns = shard_size(row, sizes, shards)
    real_rows = part_size(row.parts[0], sizes)[0]
    for shard in range(shards):
        first = min(rows, max(0, real_rows - shard * rows))
        if first < rows:
            count = rows - first
            yield ShardBox(Box(shard * rows + first, 0, count, columns), shard, Box(first, 0, count, columns))


def cover_faults(row: Row, sizes: Mapping[str, int], shards: int, *, is_per_shard: bool = True) -> Iterator[str]:
    """Why the boxes do not cover the tensors of a parameter, and its shards, exactly once each."""
    listed = [
        list(shard_boxes(row, number, sizes, shards, is_per_shard=is_per_shard)) for number in range(len(row.parts))
    ]
    every = [one for of_part in listed for one in of_part] + list(padding_boxes(row, sizes, shards))
    faults = ["rows lie beyond the last shard" if any(one.shard >= shards for one in every) else None]
    faults += [
        cover_fault((one.box for one in of_part), *part_size(part, sizes))
        for part, of_part in zip(row.parts, listed, strict=True)
    ]
    size = shard_size(row, sizes, shards, is_per_shard=is_per_shard)
    faults += [cover_fault((one.inside for one in every if one.shard == s), *size) for s in range(shards)]
    yield from (fault for fault in faults if fault is not None)
