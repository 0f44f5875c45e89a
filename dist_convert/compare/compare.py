"""Reads blocks of both checkpoints and compares their bits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch

from dist_convert.compare.blocks import BLOCK_BYTES, Amount, Block, Checkpoint
from dist_convert.errors import BudgetTooSmall
from dist_convert.models.catalog import Region
from dist_convert.read.file_reader import Buffer, FileReader, make_buffer, matrix, read_box
from dist_convert.records import Box, View, human_bytes, intersect, local_name

#: Integers as wide as each item, in which bits are compared.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Of each side a block, a region, another copy of it and the reader's scratch (2); for both, casts and masks (4).
NEEDED_BYTES = (2 * 5 + 4) * BLOCK_BYTES


@dataclass(frozen=True)
class Difference:
    """What differs in one tensor between the two checkpoints, or between two copies within one of them.

    Attributes:
        tensor: its name.
        between: the two things that were compared, in words.
        elements: how many differ, of those that were compared.
        index: of the first that differs, in the tensor.
        values: of that element on both sides.
        files: that hold it on both sides; "" where none does.
    """

    tensor: str
    between: str
    elements: int
    index: tuple[int, ...]
    values: tuple[str, str]
    files: tuple[str, str]


@dataclass
class Compared:
    """What has been compared, and the differences that were found, by tensor and `between`."""

    amount: Amount = field(default_factory=Amount)
    differences: dict[tuple[str, str], Difference] = field(default_factory=dict)

    def add(self, found: Difference) -> None:
        """Count a difference with others of its tensor, under the first index."""
        known = self.differences.get((found.tensor, found.between))
        if known:
            first = min(known, found, key=lambda one: one.index)
            found = replace(first, elements=known.elements + found.elements)
        self.differences[found.tensor, found.between] = found


@dataclass(frozen=True)
class _Side:
    letter: str
    checkpoint: Checkpoint
    files: FileReader
    whole: Buffer
    first: Buffer
    other: Buffer

    @staticmethod
    def of(letter: str, checkpoint: Checkpoint) -> "_Side":
        reader = FileReader(checkpoint.path, make_buffer(2 * BLOCK_BYTES))
        return _Side(letter, checkpoint, reader, *(make_buffer(BLOCK_BYTES) for _ in range(3)))

    def here(self, view: View) -> View:
        """A view with the name that its file has on this node."""
        return replace(view, file=local_name(view.file)) if self.checkpoint.copies else view

    def read(self, view: View, dtype: str, buffer: Buffer) -> torch.Tensor:
        """A view's stored values in a dtype, as rows x columns of a buffer."""
        self.files.read(self.here(view), dtype, 0, buffer, 0)
        return matrix(buffer, dtype, view.rows, view.columns)


def check_budget(budget_bytes: int) -> None:
    """Refuse a budget that does not hold one block of each side, by a BudgetTooSmall."""
    if budget_bytes < NEEDED_BYTES:
        what, remedy = "the memory budget is too small for one block of the comparison", "raise --max-memory-per-rank"
        expected = f"--max-memory-per-rank of at least {-(-NEEDED_BYTES // 1_000_000)}MB"
        raise BudgetTooSmall(what, expected=expected, found=human_bytes(budget_bytes), remedy=remedy)


def compare(a: Checkpoint, b: Checkpoint, mine: Iterable[Block], on_compared: Callable[[int], None]) -> Compared:
    """Compare blocks of two checkpoints: all copies within each, then one of A, in B's dtype, with one of B.

    B is what A became, so A's values are rounded to B's dtype. `on_compared` is called with the bytes of each block.

    Raises:
        SourceError: a file that ends early, or cannot be read.
    """
    compared = Compared()
    side_a, side_b = _Side.of("A", a), _Side.of("B", b)
    with closing(side_a.files), closing(side_b.files), ThreadPoolExecutor(1) as pool:
        for block in mine:
            dtype = b.tensors[block.tensor].dtype
            reading = pool.submit(_load, side_a, block.a, block, dtype)
            values_b, found_b = _load(side_b, block.b, block, dtype)
            values_a, found_a = reading.result()
            for found in (*found_a, *found_b, *_across(a, b, block, values_a, values_b)):
                compared.add(found)
            compared.amount += block.amount
            on_compared(block.size_bytes)
    return compared


def _load(side: _Side, regions: Sequence[Region], block: Block, dtype: str) -> tuple[torch.Tensor, list[Difference]]:
    """A block's values in a dtype, as rows x columns, and how the copies of its regions differ."""
    found = [one for region in regions for one in _compare_copies(side, region, block.tensor)]
    here = [replace(region, replicas=tuple(map(side.here, region.replicas[:1]))) for region in regions]
    return read_box(side.files, here, block.box, dtype, side.whole, side.first), found


def _compare_copies(side: _Side, region: Region, tensor: str) -> Iterator[Difference]:
    """Compare every other copy with the first, as they are stored."""
    if len(region.replicas) > 1:
        one, *others = region.replicas
        first = side.read(one, one.value_dtype, side.first)
        for view in others:
            other = side.read(view, one.value_dtype, side.other)
            between, files = f"two copies in {side.letter}", (one.file, view.file)
            yield from _differences(tensor, region.box, first, other, between, files)


def _across(
    a: Checkpoint, b: Checkpoint, block: Block, first: torch.Tensor, second: torch.Tensor
) -> Iterator[Difference]:
    adds = {region.add for region in (*block.a, *block.b)}
    rounds = a.tensors[block.tensor].dtype != b.tensors[block.tensor].dtype or len(adds) > 1
    for found in _differences(block.tensor, block.box, first, second, block.between, ("", ""), any_nan=rounds):
        yield replace(found, files=(_file_at(block.a, found.index), _file_at(block.b, found.index)))


def _file_at(regions: Sequence[Region], index: tuple[int, ...]) -> str:
    """The file that holds an element; "" where it is a zero that no file holds."""
    row, column = index
    replicas = next(region.replicas for region in regions if intersect(region.box, Box(row, column, 1, 1)))
    return replicas[0].file if replicas else ""


def _differences(
    tensor: str,
    box: Box,
    first: torch.Tensor,
    second: torch.Tensor,
    between: str,
    files: tuple[str, str],
    *,
    any_nan: bool = False,
) -> Iterator[Difference]:
    """How two contiguous matrices of one dtype, a box of the tensor, differ in bits, if they do.

    With `any_nan` a NaN equals every NaN: casts do not define what they make of its other bits.
    """
    bits = _BITS[first.dtype.itemsize]
    mask = first.view(bits) != second.view(bits)
    if any_nan and mask.any():
        mask &= ~(first.isnan() & second.isnan())
    elements = int(mask.count_nonzero())
    if elements:
        row, column = divmod(int(mask.flatten().view(torch.uint8).argmax()), box.columns)
        values = _value(first[row, column]), _value(second[row, column])
        yield Difference(tensor, between, elements, (box.row + row, box.column + column), values, files)


def _value(element: torch.Tensor) -> str:
    """An element's value and its bits."""
    digits = 2 * element.dtype.itemsize
    bits = int(element.view(_BITS[element.dtype.itemsize])) & ((1 << 4 * digits) - 1)
    return f"{float(element):.7g} (0x{bits:0{digits}x})"
