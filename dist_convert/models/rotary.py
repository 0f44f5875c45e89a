"""The order of a head's rows: transformers and Megatron rotate row j with row j + d/2, Meta's code row 2j with 2j + 1.

So row j of the first half of a head of d rows is row 2j of Meta's, and row j of its second half row 2j + 1.
"""

from collections.abc import Iterable
from dataclasses import replace

from dist_convert.models.catalog import Region
from dist_convert.records import Box


def from_neighbours(stored: Iterable[Region], head_dim: int) -> tuple[Region, ...]:
    """Regions of heads in Meta's order, as regions of the tensor in the order of transformers.

    Args:
        stored: boxes of the tensor as Meta has it; they may begin and end inside of a head.
        head_dim: rows of a head, an even number.

    Returns:
        Of each head in a region, every other row from an even one on, and from an odd one on; by row.
    """
    found = []
    for region in stored:
        box = region.box
        for head in range(box.row - box.row % head_dim, box.row_end, head_dim):
            start, end = max(head, box.row), min(head + head_dim, box.row_end)
            for half in (0, 1):
                row = start + (start - head + half) % 2
                rows = (end - row + 1) // 2
                if rows:
                    inside = region.window(Box(row, box.column, end - row, box.columns))
                    views = tuple(replace(view, rows=rows, row_stride=2 * view.row_stride) for view in inside)
                    first = head + half * head_dim // 2 + (row - head) // 2
                    found.append(Region(Box(first, box.column, rows, box.columns), views, region.add))
    return tuple(sorted(found, key=lambda region: (region.box.row, region.box.column)))
