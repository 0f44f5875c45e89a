"""What is compared and by whom: tensors that both checkpoints have, cut into blocks, sampled and dealt to ranks.

Every rank works all of it out alike, from the same headers.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from dist_convert.boxes import Box, intersect, tiles
from dist_convert.errors import UsageError
from dist_convert.records import DTYPE_BYTES
from dist_convert.verify.catalog import Checkpoint, Region

#: Bytes of one block in the wider of its two dtypes.
BLOCK_BYTES = 2 << 20

#: Columns of a block of a tensor that either side stores transposed: runs of 2 KiB at least.
_TRANSPOSED_COLUMNS = 1024


@dataclass(frozen=True)
class Block:
    """A box of a tensor, with the regions of both checkpoints that lie in it, cut to it (counted from the tensor)."""

    tensor: str
    box: Box
    a: tuple[Region, ...]
    b: tuple[Region, ...]

    @property
    def size_bytes(self) -> int:
        """Of everything that is read: every copy on both sides."""
        return sum(view.size_bytes for region in (*self.a, *self.b) for view in region.copies)


def shared_tensors(a: Checkpoint, b: Checkpoint) -> list[str]:
    """The tensors that both have in one shape, in the order of the first."""
    return [name for name, tensor in a.tensors.items() if name in b.tensors and tensor.shape == b.tensors[name].shape]


def blocks(a: Checkpoint, b: Checkpoint, sample: Fraction) -> Iterator[Block]:
    """Every block that is compared; a tensor that neither side stores has none.

    Args:
        a, b: the checkpoints.
        sample: share of the blocks; the first and the last of each tensor always belong to it.
    """
    for name in shared_tensors(a, b):
        regions_a, regions_b = a.regions(name), b.regions(name)
        copies = [view for region in (*regions_a, *regions_b) for view in region.copies]
        if not copies:
            continue
        tensor = a.tensors[name]
        item_bytes = max(DTYPE_BYTES[side.tensors[name].dtype] for side in (a, b))
        columns = min(tensor.columns, BLOCK_BYTES // item_bytes)
        if any(view.is_transposed for view in copies):
            columns = min(columns, _TRANSPOSED_COLUMNS)
        boxes = list(tiles(tensor.rows, tensor.columns, max(1, BLOCK_BYTES // (columns * item_bytes)), columns))
        for number, box in enumerate(boxes):
            if number in (0, len(boxes) - 1) or is_sampled(name, number, sample):
                yield Block(name, box, _cut(regions_a, box), _cut(regions_b, box))


def is_sampled(tensor: str, number: int, share: Fraction) -> bool:
    """Whether a block belongs to the sample: by a hash, so that every run and every rank takes the same ones."""
    drawn = int.from_bytes(hashlib.sha256(f"{tensor}:{number}".encode()).digest()[:8], "big")
    return drawn < share * (1 << 64)


def _cut(regions: tuple[Region, ...], box: Box) -> tuple[Region, ...]:
    found = []
    for region in regions:
        inside = intersect(region.box, box)
        if inside is not None:
            window = Box(inside.row - region.box.row, inside.column - region.box.column, inside.rows, inside.columns)
            found.append(Region(inside, tuple(view.window(window) for view in region.copies)))
    return tuple(found)


def deal(a: Checkpoint, b: Checkpoint, sample: Fraction) -> Iterator[tuple[int, Block]]:
    """Every block with the rank that compares it: the least loaded of those that see all files with a copy of it.

    Raises:
        UsageError: no rank sees all files that a block needs.
    """
    everyone = tuple(range(len(a.visible)))
    is_shared = len(set(a.visible)) == len(set(b.visible)) == 1
    loads: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for block in blocks(a, b, sample):
        ranks = everyone if is_shared else _seeing(a, b, block)
        if ranks not in loads:
            loads[ranks] = [(0, rank) for rank in ranks]
        load_bytes, rank = loads[ranks][0]
        heapq.heapreplace(loads[ranks], (load_bytes + block.size_bytes, rank))
        yield rank, block


def _seeing(a: Checkpoint, b: Checkpoint, block: Block) -> tuple[int, ...]:
    files_a, files_b = ({view.file for region in regions for view in region.copies} for regions in (block.a, block.b))
    ranks = tuple(
        rank
        for rank, (seen_a, seen_b) in enumerate(zip(a.visible, b.visible, strict=True))
        if files_a <= seen_a and files_b <= seen_b
    )
    if not ranks:
        raise UsageError(
            "no rank sees all files that hold a tensor, so its copies cannot be compared",
            tensor=block.tensor,
            expected="one rank that can read " + ", ".join(sorted(files_a | files_b)[:8]),
            found="these files are spread over the disks of several nodes",
            remedy="verify where all nodes share the files, or leave the verification out",
        )
    return ranks
