"""Where each tensor lies inside the shards of the Megatron parameter that it is stacked into. Integers only.

Facts: docs/formats.md, "Attention and the query-group interleave" and "MLP and the gate-up interleave".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from dist_convert.errors import PlanError
from dist_convert.formats.megatron.names import Spelling, spellings
from dist_convert.models.schema import Row, part_size
from dist_convert.records import Box, cover_fault


@dataclass(frozen=True)
class ShardBox:
    """A box of a tensor, the number of the shard that holds it, and the equal box of that shard."""

    box: Box
    shard: int
    inside: Box


@dataclass(frozen=True)
class CutRow:
    """A table row that is cut into so many different shards: what its parameters of all layers and experts share.

    Attributes:
        row: of the table.
        sizes: see `Architecture.sizes`.
        shards: different shards of each parameter.
        is_per_shard: tensors that are stacked and cut in rows are cut first and stacked in each shard, as Megatron does
            with gate and up, and not stacked first. Where they alternate by query groups it makes no difference.
    """

    row: Row
    sizes: Mapping[str, int]
    shards: int
    is_per_shard: bool = True

    @property
    def part_rows(self) -> list[int]:
        """Rows of each of its tensors."""
        return [part_size(part, self.sizes)[0] for part in self.row.parts]

    @property
    def turns(self) -> int:
        """How often the rows of its tensors follow each other."""
        if self.row.by_query_group:
            return self.sizes["query_groups"]
        return self.shards if self.is_per_shard and self.row.split == "rows" and len(self.row.parts) > 1 else 1

    @cached_property
    def shard_size(self) -> tuple[int, int]:
        """Rows and columns of each shard; a PlanError where the parameter cannot be cut into that many equal ones."""
        row, shards = self.row, self.shards
        rows = self.sizes[row.padded_rows] if row.padded_rows else sum(self.part_rows)
        columns = part_size(row.parts[0], self.sizes)[1]
        length = {"rows": rows, "columns": columns, "replicated": shards}[row.split]
        if length % shards or (not row.by_query_group and any(of_part % self.turns for of_part in self.part_rows)):
            what, expected = f"cannot be cut into {shards} equal shards", f"a multiple of {shards} {row.split}"
            found = f"{' + '.join(map(str, self.part_rows))} rows, {columns} columns"
            remedy = "the tensor parallel size in the checkpoint's args does not belong to this model"
            raise PlanError(what, tensor=row.megatron, expected=expected, found=found, remedy=remedy)
        return rows // shards if row.split == "rows" else rows, columns // shards if row.split == "columns" else columns

    @cached_property
    def boxes(self) -> tuple[tuple[ShardBox, ...], ...]:
        """For each of its tensors, see `shard_boxes`."""
        return tuple(tuple(shard_boxes(self, number)) for number in range(len(self.row.parts)))

    @cached_property
    def padding(self) -> tuple[ShardBox, ...]:
        """The rows of each shard behind the last one of the only tensor, as the tensor's rows would go on."""
        found, (rows, columns), (real_rows, *_) = [], self.shard_size, self.part_rows
        for shard in range(self.shards) if self.row.padded_rows else ():
            first = min(rows, max(0, real_rows - shard * rows))
            if first < rows:
                inside = Box(first, 0, rows - first, columns)
                found.append(ShardBox(Box(shard * rows + first, 0, rows - first, columns), shard, inside))
        return tuple(found)

    @cached_property
    def spellings(self) -> tuple[Spelling, ...]:
        """See `names.spellings`."""
        return spellings(self.row)

    @cached_property
    def faults(self) -> tuple[str, ...]:
        """Why the boxes do not cover its tensors, and its shards, exactly once each."""
        every = [one for of_part in self.boxes for one in of_part] + list(self.padding)
        faults = ["rows lie beyond the last shard" if any(one.shard >= self.shards for one in every) else None]
        for part, of_part in zip(self.row.parts, self.boxes, strict=True):
            faults.append(cover_fault((one.box for one in of_part), *part_size(part, self.sizes)))
        for shard in range(self.shards):
            faults.append(cover_fault((one.inside for one in every if one.shard == shard), *self.shard_size))
        return tuple(fault for fault in faults if fault is not None)


def shard_boxes(cut: CutRow, part: int) -> Iterator[ShardBox]:
    """Every box of the tensor of that number, in the order of its rows, or of its columns where those are cut."""
    rows, columns = part_size(cut.row.parts[part], cut.sizes)
    shard_rows, shard_columns = cut.shard_size
    if cut.row.split != "rows":
        for shard in range(cut.shards):
            box = Box(0, shard * shard_columns, rows, shard_columns)
            yield ShardBox(box, shard, Box(0, 0, rows, shard_columns))
        return
    heights = [of_part // cut.turns for of_part in cut.part_rows]
    for turn in range(cut.turns):
        stacked_row, end = turn * sum(heights) + sum(heights[:part]), turn * sum(heights) + sum(heights[: part + 1])
        tensor_row = turn * heights[part]
        while stacked_row < end:  # a query group may lie in two shards
            shard, inside = divmod(stacked_row, shard_rows)
            count = min(end - stacked_row, shard_rows - inside)
            yield ShardBox(Box(tensor_row, 0, count, columns), shard, Box(inside, 0, count, columns))
            stacked_row, tensor_row = stacked_row + count, tensor_row + count
