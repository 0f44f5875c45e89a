"""What is compared: the tensors that both checkpoints have, cut into blocks, all of them or a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from fractions import Fraction

from dist_convert.boxes import Box, intersect, tiles
from dist_convert.records import DTYPE_BYTES
from dist_convert.verify.catalog import Checkpoint, Region

#: Bytes of one block in the wider of its two dtypes.
BLOCK_BYTES = 2 << 20

#: Columns of a block of a tensor that either side stores transposed: runs of 2 KiB at least.
_TRANSPOSED_COLUMNS = 1024


@dataclass(frozen=True)
class Amount:
    """What a comparison counts.

    Attributes:
        elements: of the model.
        bytes_a, bytes_b: that are stored for them, all copies.
        copies_a_bytes, copies_b_bytes: of these, what is in copies beyond the first.
    """

    elements: int = 0
    bytes_a: int = 0
    bytes_b: int = 0
    copies_a_bytes: int = 0
    copies_b_bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(first + second for first, second in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Block:
    """A box of a tensor that one rank compares.

    Attributes:
        tensor, box: its name, and the box in it.
        a, b: the regions of both checkpoints that lie in the box, cut to it (counted from the tensor).
        amount: what is compared here for the first time.
        between: "A and B", or which other copies of them.
    """

    tensor: str
    box: Box
    a: tuple[Region, ...]
    b: tuple[Region, ...]
    amount: Amount
    between: str = "A and B"

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
                yield whole_block(name, box, cut(regions_a, box), cut(regions_b, box))


def whole_block(tensor: str, box: Box, a: tuple[Region, ...], b: tuple[Region, ...]) -> Block:
    """A block with every copy of what it compares."""
    every = [sum(view.size_bytes for region in regions for view in region.copies) for regions in (a, b)]
    further = [sum(view.size_bytes for region in regions for view in region.copies[1:]) for regions in (a, b)]
    return Block(tensor, box, a, b, Amount(box.elements, *every, *further))


def is_sampled(tensor: str, number: int, share: Fraction) -> bool:
    """Whether a block belongs to the sample: by a hash, so that every run and every rank takes the same ones."""
    drawn = int.from_bytes(hashlib.sha256(f"{tensor}:{number}".encode()).digest()[:8], "big")
    return drawn < share * (1 << 64)


def cut(regions: tuple[Region, ...], box: Box) -> tuple[Region, ...]:
    """The regions that lie in a box, and of each what lies in it."""
    found = []
    for region in regions:
        inside = intersect(region.box, box)
        if inside is not None:
            window = Box(inside.row - region.box.row, inside.column - region.box.column, inside.rows, inside.columns)
            found.append(Region(inside, tuple(view.window(window) for view in region.copies)))
    return tuple(found)
