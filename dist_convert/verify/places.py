"""Where the rows of a Hugging Face tensor lie in the shards of a Megatron parameter.

`plan.geometry` walks through the shards and says what they hold; here a tensor's own rows are walked through and
numbered, so that a mistake of either shows when a conversion is verified. Facts: docs/formats.md, "Attention and the
query-group interleave" and "MLP and the gate-up interleave".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dist_convert.boxes import Box
from dist_convert.models.schema import Row
from dist_convert.plan.geometry import part_size, shard_size


@dataclass(frozen=True)
class Place:
    """A box of a Hugging Face tensor, the shard that holds it, and the equal box of that shard."""

    box: Box
    shard: int
    inside: Box


def places(row: Row, part: int, sizes: Mapping[str, int], shards: int) -> Iterator[Place]:
    """Every place of one part of a parameter; their boxes cover the part once.

    Args:
        row: of the table.
        part: number of the Hugging Face tensor in the row's parts.
        sizes: see `Architecture.sizes`.
        shards: different shards of the parameter.
    """
    rows, columns = part_size(row.parts[part], sizes)
    shard_rows, shard_columns = shard_size(row, sizes, shards)
    if row.split != "rows":
        for shard in range(shards):
            box = Box(0, shard * shard_columns, rows, shard_columns)
            yield Place(box, shard, Box(0, 0, rows, shard_columns))
        return
    turns = {"shards": shards, "query_groups": sizes["query_groups"], "none": 1}[row.interleave]
    heights = [part_size(other, sizes)[0] // turns for other in row.parts]
    first = 0
    while first < rows:
        turn, within = divmod(first, heights[part])
        shard, at = divmod(turn * sum(heights) + sum(heights[:part]) + within, shard_rows)
        count = min(heights[part] - within, shard_rows - at)
        yield Place(Box(first, 0, count, columns), shard, Box(at, 0, count, columns))
        first += count
