"""Reads blocks of both checkpoints and compares their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch

from dist_convert.compare.blocks import BLOCK_BYTES, Amount, Block
from dist_convert.compare.catalog import Checkpoint
from dist_convert.errors import BudgetTooSmall
from dist_convert.models.catalog import Region
from dist_convert.read.buffers import Buffer, make_buffer
from dist_convert.read.file_reader import TORCH_DTYPES, FileReader
from dist_convert.records import DTYPE_BYTES, Box, View, human_bytes, local_name

#: Integers as wide as each item, in which bits are compared.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Of each side a block, a region, another copy of it and the reader's scratch (2); for both, casts and masks (4).
NEEDED_BYTES = (2 * 5 + 4) * BLOCK_BYTES


@dataclass
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
    """What one rank has compared, and the differences that it found by (tensor, between)."""

    amount: Amount = field(default_factory=Amount)
    differences: dict[tuple[str, str], Difference] = field(default_factory=dict)

    def add(self, found: Difference | None) -> None:
        """Keep a difference; those of one tensor are counted together, under the first index."""
        if found is None:
            return
        key = (found.tensor, found.between)
        known = self.differences.setdefault(key, found)
        if known is not found:
            found.elements += known.elements
            if known.index < found.index:
                found.index, found.values, found.files = known.index, known.values, known.files
            self.differences[key] = found


@dataclass(frozen=True)
class _Side:
    letter: str
    checkpoint: Checkpoint
    reader: FileReader
    whole: Buffer
    first: Buffer
    other: Buffer


def check_budget(budget_bytes: int) -> None:
    """Refuse a budget that does not hold one block of each side.

    Raises:
        BudgetTooSmall
    """
    if budget_bytes < NEEDED_BYTES:
        raise BudgetTooSmall(
            "the memory budget does not hold what is compared at a time",
            expected=f"--max-memory-per-rank of at least {-(-NEEDED_BYTES // 1_000_000)}MB",
            found=human_bytes(budget_bytes),
            remedy="raise --max-memory-per-rank",
        )


def compare(a: Checkpoint, b: Checkpoint, mine: Iterable[Block], on_compared: Callable[[int], None]) -> Compared:
    """Compare blocks of two checkpoints: all copies within each, then one of A, in B's dtype, with one of B.

    Args:
        a, b: the checkpoints; B is what A became, so A's values are rounded to B's dtype.
        mine: the blocks of this rank.
        on_compared: called with the bytes of each block.

    Raises:
        SourceError: a file that ends early, or cannot be read.
    """
    compared = Compared()
    with (
        closing(FileReader(a.path, make_buffer(2 * BLOCK_BYTES))) as reader_a,
        closing(FileReader(b.path, make_buffer(2 * BLOCK_BYTES))) as reader_b,
        ThreadPoolExecutor(1) as pool,
    ):
        side_a = _Side("A", a, reader_a, *(make_buffer(BLOCK_BYTES) for _ in range(3)))
        side_b = _Side("B", b, reader_b, *(make_buffer(BLOCK_BYTES) for _ in range(3)))
        for block in mine:
            target = b.tensors[block.tensor]
            reading = pool.submit(_load, side_a, block.a, block, target.dtype)
            values_b, found_b = _load(side_b, block.b, block, target.dtype)
            values_a, found_a = reading.result()
            for found in (*found_a, *found_b, _cross(a, b, block, values_a, values_b)):
                compared.add(found)
            compared.amount += block.amount
            on_compared(block.size_bytes)
    return compared


def _load(side: _Side, regions: Sequence[Region], block: Block, dtype: str) -> tuple[torch.Tensor, list[Difference]]:
    """A block's values in a dtype, as rows x columns, and how the copies of its regions differ."""
    box = block.box
    found = [difference for region in regions for difference in _compare_copies(side, region, block.tensor)]
    item_bytes = DTYPE_BYTES[dtype]
    matrix = side.whole.tensor[: box.elements * item_bytes].view(TORCH_DTYPES[dtype]).view(box.rows, box.columns)
    for region in regions:
        row, column = region.box.row - box.row, region.box.column - box.column
        if region.replicas and region.box.columns == box.columns:
            offset_bytes = row * box.columns * item_bytes
            side.reader.read(_here(side, region.replicas[0]), dtype, region.add, side.whole, offset_bytes)
            continue
        window = matrix[row : row + region.box.rows, column : column + region.box.columns]
        if region.replicas:
            window.copy_(_read(side, region.replicas[0], dtype, region.add, side.first))
        else:
            window.zero_()
    return matrix, found


def _here(side: _Side, view: View) -> View:
    """A view with the name that its file has on this node."""
    return replace(view, file=local_name(view.file)) if side.checkpoint.is_at_places else view


def _read(side: _Side, view: View, dtype: str, add: int, buffer: Buffer) -> torch.Tensor:
    side.reader.read(_here(side, view), dtype, add, buffer, 0)
    size_bytes = view.rows * view.columns * DTYPE_BYTES[dtype]
    return buffer.tensor[:size_bytes].view(TORCH_DTYPES[dtype]).view(view.rows, view.columns)


def _compare_copies(side: _Side, region: Region, tensor: str) -> list[Difference]:
    """Compare every other copy with the first, as they are stored."""
    found = []
    if len(region.replicas) > 1:
        one = region.replicas[0]
        first = _read(side, one, one.dtype, 0, side.first)
        for view in region.replicas[1:]:
            other = _read(side, view, one.dtype, 0, side.other)
            difference = _difference(
                tensor, region.box, first, other, f"two copies in {side.letter}", (one.file, view.file)
            )
            found += [difference] if difference else []
    return found


def _cross(a: Checkpoint, b: Checkpoint, block: Block, first: torch.Tensor, second: torch.Tensor) -> Difference | None:
    of_a, of_b = a.tensors[block.tensor], b.tensors[block.tensor]
    adds = {region.add for region in (*block.a, *block.b)}
    rounds = of_a.dtype != of_b.dtype or len(adds) > 1
    found = _difference(block.tensor, block.box, first, second, block.between, ("", ""), any_nan=rounds)
    if found is not None:
        found.files = (_file_at(block.a, found.index), _file_at(block.b, found.index))
    return found


def _file_at(regions: Sequence[Region], index: tuple[int, ...]) -> str:
    row, column = index
    here = (
        region
        for region in regions
        if region.box.row <= row < region.box.row_end and region.box.column <= column < region.box.column_end
    )
    copies = next(here).replicas
    return copies[0].file if copies else ""


def _difference(
    tensor: str,
    box: Box,
    first: torch.Tensor,
    second: torch.Tensor,
    between: str,
    files: tuple[str, str],
    *,
    any_nan: bool = False,
) -> Difference | None:
    """How two matrices of one dtype differ in bits.

    Args:
        tensor, between, files: see `Difference`.
        box: of the tensor, which the matrices are.
        first, second: contiguous.
        any_nan: a NaN equals every NaN: casts do not define what they make of its other bits.
    """
    bits = _BITS[first.dtype.itemsize]
    mask = first.view(bits) != second.view(bits)
    if any_nan and mask.any():
        mask &= ~(first.isnan() & second.isnan())
    elements = int(mask.count_nonzero())
    if not elements:
        return None
    position = int(mask.flatten().view(torch.uint8).argmax())
    row, column = divmod(position, box.columns)
    values = (_value(first[row, column]), _value(second[row, column]))
    return Difference(tensor, between, elements, (box.row + row, box.column + column), values, files)


def _value(element: torch.Tensor) -> str:
    """An element's value and its bits."""
    digits = 2 * element.dtype.itemsize
    bits = int(element.view(_BITS[element.dtype.itemsize])) & ((1 << 4 * digits) - 1)
    return f"{float(element):.7g} (0x{bits:0{digits}x})"
