"""Integers that the parts of a conversion hand to each other: boxes, stored tensors, views, copies. No torch.

Every tensor is seen as rows by columns; a vector of n elements is n rows of one column. Boxes and runs count elements,
all else says its unit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from operator import mul
from typing import Any

from dist_convert.errors import PlanError, UsageError

__version__ = "0.2.0"

#: A JSON object that is read only, such as training arguments or a config.json.
JsonObject = Mapping[str, Any]
#: For each rank, files that it can read, or write.
FilesOfRanks = Sequence[frozenset[str]]


@dataclass(frozen=True)
class Box:
    """A rectangle of elements: its first row and column, and its size."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def row_end(self) -> int:
        return self.row + self.rows

    @property
    def column_end(self) -> int:
        return self.column + self.columns


def intersect(first: Box, second: Box) -> Box | None:
    """The common part of two boxes, or None where they share no element."""
    row, column = max(first.row, second.row), max(first.column, second.column)
    rows = min(first.row_end, second.row_end) - row
    columns = min(first.column_end, second.column_end) - column
    return Box(row, column, rows, columns) if rows > 0 and columns > 0 else None


def tiles(rows: int, columns: int, tile_rows: int, tile_columns: int) -> Iterator[Box]:
    """Cut a rows x columns rectangle into tiles, row by row; the last ones may be smaller."""
    for row in range(0, rows, tile_rows):
        for column in range(0, columns, tile_columns):
            yield Box(row, column, min(tile_rows, rows - row), min(tile_columns, columns - column))


#: Columns of a tile of what is stored transposed: runs of 2 KiB at least, whichever way it is read.
TILE_COLUMNS = 1024
#: Rows of a tile are a multiple of this where so many fit: heads, whose rows may alternate, are not cut.
TILE_ROWS = 128


def block_tiles(
    rows: int, columns: int, element_bytes: int, block_bytes: int, *, is_transposed: bool = False
) -> Iterator[Box]:
    """Cut a rows x columns rectangle into tiles of at most `block_bytes`, of whole rows where these fit and are not
    stored transposed; of rows in turns of `TILE_ROWS`, so that heads are not cut."""
    tile_columns = min(columns, TILE_COLUMNS if is_transposed else columns, max(1, block_bytes // element_bytes))
    tile_rows = max(1, block_bytes // (tile_columns * element_bytes))
    return tiles(rows, columns, tile_rows - tile_rows % min(tile_rows, TILE_ROWS), tile_columns)


def cover_fault(boxes: Iterable[Box], rows: int, columns: int) -> str | None:
    """Say why the boxes do not cover rows x columns exactly once each, or None if they do.

    The boxes must form bands: those that share a row share their whole row range. Copies of one parameter do.
    """
    next_row = 0
    by_place = sorted(boxes, key=lambda box: (box.row, box.rows, box.column))
    for (row, band_rows), band in groupby(by_place, key=lambda box: (box.row, box.rows)):
        if row != next_row:
            return f"rows {_fault(next_row, row)}"
        rows_of_band = f"rows {row}..{row + band_rows - 1}"
        next_column = 0
        for box in band:
            if box.column != next_column:
                return f"columns {_fault(next_column, box.column, f' of {rows_of_band}')}"
            next_column = box.column_end
        if next_column != columns:
            return f"{rows_of_band} are covered up to column {next_column} of {columns}"
        next_row = row + band_rows
    return None if next_row == rows else f"rows are covered up to {next_row} of {rows}"


def _fault(expected: int, found: int, where: str = "") -> str:
    first, end = sorted((expected, found))
    return f"{first}..{end - 1}{where} are {'not covered' if found > expected else 'covered twice'}"


@dataclass(frozen=True)
class Runs:
    """How a strided window is fetched: equal runs of stored elements, packed one after the other.

    `starts` are element offsets from the window's first element; in the packed buffer the window has the strides
    `row_stride` and `column_stride`. Several runs hold a row each, or a column each if not `by_row`.
    """

    starts: range
    run_elements: int
    row_stride: int
    column_stride: int
    by_row: bool = True


#: Elements of a line for whose sake the gap behind it is not read.
_LONG_LINE = 16384


def runs(rows: int, columns: int, row_stride: int, column_stride: int) -> Runs:
    """Choose one read of the whole span, or one per line along the larger stride: where the span is mostly gaps, or
    lines are long."""
    span = 1 + (rows - 1) * row_stride + (columns - 1) * column_stride
    if span <= 2 * rows * columns and (row_stride <= columns or column_stride > 1 or columns < _LONG_LINE):
        return Runs(range(1), span, row_stride, column_stride)
    if row_stride >= column_stride:
        line = 1 + (columns - 1) * column_stride
        return Runs(range(0, rows * row_stride, row_stride), line, line, column_stride)
    line = 1 + (rows - 1) * row_stride
    return Runs(range(0, columns * column_stride, column_stride), line, row_stride, line, by_row=False)


#: Bytes of one element, by the dtype's safetensors name (https://huggingface.co/docs/safetensors, "Format").
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "C64": 8, "C128": 16,
}  # fmt: skip

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps; an empty dimension counts as one, as torch has it."""
    steps = accumulate((max(length, 1) for length in shape[:0:-1]), mul, initial=1)
    return tuple(steps)[::-1] if shape else ()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: where its first element is, and how the others follow.

    Attributes:
        name: its name in the file.
        file: the file, relative to the checkpoint directory, with `/` between the parts.
        dtype: safetensors name, a key of `DTYPE_BYTES`.
        shape: elements per dimension.
        strides: elements between neighbours, per dimension.
        offset_bytes: of the first element, from the start of the file.
        checksum: CRC-32 of its bytes, where the file tells it of this tensor alone.
        scales: of a quantised tensor, whose elements are codes, along its last two dimensions.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset_bytes: int
    checksum: int | None = None
    scales: Scales | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Without its scales."""
        return self.elements // (self.scales.packed if self.scales else 1) * DTYPE_BYTES[self.dtype]

    def entry(self, index: int) -> StoredTensor:
        """One entry along the first dimension, such as an expert; its scales begin with a row of their own."""
        (first, *strides), (_, *shape) = self.strides, self.shape
        offset_bytes = self.offset_bytes + index * first * DTYPE_BYTES[self.dtype]
        scales = self.scales
        if scales is not None:
            blocks = -(-shape[0] // scales.block_rows)
            scales = scales.moved(index * blocks * scales.block_rows, 0)
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset_bytes=offset_bytes, scales=scales)


@dataclass(frozen=True)
class Scales:
    """What the elements of a quantised view are multiplied with: one stored number for each block of them.

    Attributes:
        first: the one of the view's first element; the others follow at its strides.
        block_rows, block_columns: elements of a block.
        packed: elements in each stored one, along the columns.
        row, column: of the view's first element in its block.
    """

    first: View
    block_rows: int
    block_columns: int
    packed: int = 1
    row: int = 0
    column: int = 0

    def moved(self, rows: int, columns: int) -> Scales:
        """Those of a view that begins so many rows and columns further."""
        down, row = divmod(self.row + rows, self.block_rows)
        right, column = divmod(self.column + columns, self.block_columns)
        first = replace(self.first, offset_bytes=self.first.offset_at(down, right))
        return replace(self, first=first, row=row, column=column)

    def stored_columns(self, columns: int) -> int:
        """How many stored elements further the code of so many columns further is."""
        return (self.column + columns) // self.packed - self.column // self.packed

    def of(self, rows: int, columns: int) -> View:
        """All of them for so many rows and columns."""
        down = (self.row + rows - 1) // self.block_rows + 1
        return replace(self.first, rows=down, columns=(self.column + columns - 1) // self.block_columns + 1)


@dataclass(frozen=True)
class View:
    """A two-dimensional window on stored bytes: `rows` x `columns` elements at element strides.

    With scales the elements are codes, which are decoded while they are read.
    """

    file: str
    tensor: str
    dtype: str
    offset_bytes: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int
    scales: Scales | None = None

    @staticmethod
    def of(tensor: StoredTensor) -> View:
        """A whole matrix or vector, as it is stored."""
        columns, column_stride = (tensor.shape[1], tensor.strides[1]) if len(tensor.shape) == 2 else (1, 1)
        rows, row_stride = tensor.shape[0], tensor.strides[0]
        place = tensor.file, tensor.name, tensor.dtype, tensor.offset_bytes
        return View(*place, rows, columns, row_stride, column_stride, tensor.scales)

    def offset_at(self, row: int, column: int) -> int:
        """Where the bytes of an element begin in the file."""
        column = self.scales.stored_columns(column) if self.scales else column
        return self.offset_bytes + (row * self.row_stride + column * self.column_stride) * DTYPE_BYTES[self.dtype]

    def window(self, box: Box) -> View:
        """The part of this view inside `box`."""
        if (box.rows, box.columns) == (self.rows, self.columns):
            return self
        place, strides = (self.file, self.tensor, self.dtype), (self.row_stride, self.column_stride)
        scales = self.scales and self.scales.moved(box.row, box.column)
        return View(*place, self.offset_at(box.row, box.column), box.rows, box.columns, *strides, scales)

    def transposed(self) -> View:
        """The same elements with rows and columns exchanged; of a view without scales."""
        return replace(
            self, rows=self.columns, columns=self.rows, row_stride=self.column_stride, column_stride=self.row_stride
        )

    def with_row_stride(self, rows: int, row_stride: int) -> View:
        """So many rows at another distance, 0 to repeat the first; scales are those of single rows."""
        scales = self.scales
        if scales and self.row_stride:
            first = scales.first
            scales = replace(scales, first=replace(first, row_stride=first.row_stride * row_stride // self.row_stride))
        return replace(self, rows=rows, row_stride=row_stride, scales=scales)

    @property
    def value_dtype(self) -> str:
        """Of the elements when they are read: models are quantised from bf16."""
        return "BF16" if self.scales else self.dtype

    @property
    def codes(self) -> View:
        """What is stored of it without its scales: where codes are packed, its columns are what they are packed in."""
        if self.scales is None:
            return self
        return replace(self, columns=self.scales.stored_columns(self.columns - 1) + 1, scales=None)

    @property
    def size_bytes(self) -> int:
        """Of what is stored of it, scales included."""
        if self.scales:
            return self.codes.size_bytes + self.scales.of(self.rows, self.columns).size_bytes
        return self.rows * self.columns * DTYPE_BYTES[self.dtype]

    @property
    def is_dense(self) -> bool:
        """Whether the elements lie row after row without gaps."""
        return (self.columns == 1 or self.column_stride == 1) and (self.rows == 1 or self.row_stride == self.columns)

    @property
    def is_transposed(self) -> bool:
        """Whether neighbours in a row are apart in the file, as in a transposed matrix."""
        return self.columns > 1 and self.column_stride != 1

    @property
    def is_scattered(self) -> bool:
        """Whether no element has a neighbour in the file, as its rows lie between those of another tensor."""
        return min(self.rows, self.columns, self.row_stride, self.column_stride) > 1


def in_turn(views: Sequence[View]) -> View | None:
    """Two views whose rows take turns in one tensor as one view; None for others."""
    if len(views) != 2 or views[0].row_stride % 2 or (views[0].columns > 1 and views[0].column_stride == 1):
        return None
    first, row_stride = views[0], views[0].row_stride // 2
    second = replace(first, offset_bytes=first.offset_bytes + row_stride * DTYPE_BYTES[first.dtype])
    return replace(first, rows=2 * first.rows, row_stride=row_stride) if row_stride and views[1] == second else None


def side_by_side(left: View, right: View) -> View | None:
    """Both views as one, where the right one continues the rows of the left one."""
    lines = [(view.file, view.tensor, view.rows, view.row_stride, view.column_stride) for view in (left, right)]
    if lines[0] != lines[1] or left.column_stride != 1:
        return None
    joined = replace(left, columns=left.columns + right.columns)
    is_next = joined.window(Box(0, left.columns, left.rows, right.columns)) == right
    return joined if is_next and left.row_stride >= joined.codes.columns else None


def alternating(left: View, right: View) -> View | None:
    """Two views whose rows alternate in the file without gaps as one, with a row of each side by side."""
    return side_by_side(left, right) if left.row_stride == 2 * left.columns else None


@dataclass(frozen=True)
class Window:
    """The bytes of a file that one write fills: `runs` stretches of `run_bytes`, each `stride_bytes` after the other.

    A write without gaps is one run, with stride 0.
    """

    file: str
    offset_bytes: int
    run_bytes: int
    stride_bytes: int = 0
    runs: int = 1

    @staticmethod
    def of(view: View) -> Window:
        """The bytes of a view, which is written along its contiguous dimension; a PlanError where it has none."""
        if view.is_scattered:
            raise PlanError("bytes between a window's elements belong to others", view.file, tensor=view.tensor)
        lines = view.transposed() if view.is_transposed else view
        if lines.is_dense:
            return Window(lines.file, lines.offset_bytes, lines.size_bytes)
        run_bytes, stride_bytes = (n * DTYPE_BYTES[lines.dtype] for n in (lines.columns, lines.row_stride))
        return Window(lines.file, lines.offset_bytes, run_bytes, stride_bytes, lines.rows)

    @property
    def size_bytes(self) -> int:
        return self.run_bytes * self.runs


@dataclass(frozen=True)
class Copy:
    """One box copy: any one of `sources` (which hold equal values) goes to every one of `targets`.

    All views have the same rows and columns. `add` is added to each value on the way (1 for norms that are stored as
    gamma - 1, docs/formats.md "Norms and their spellings").
    """

    sources: tuple[View, ...]
    targets: tuple[View, ...]
    add: int = 0

    @property
    def rows(self) -> int:
        return self.sources[0].rows

    @property
    def columns(self) -> int:
        return self.sources[0].columns

    def window(self, box: Box) -> Copy:
        """The part of this copy inside `box`."""
        sources, targets = ([view.window(box) for view in views] for views in (self.sources, self.targets))
        return Copy(tuple(sources), tuple(targets), self.add)

    def into(self, files: Collection[str]) -> Copy:
        """The same to those targets that lie in some files, which may be none."""
        if all(view.file in files for view in self.targets):
            return self
        return replace(self, targets=tuple(view for view in self.targets if view.file in files))


#: A tensor to be written: name, dtype, shape.
TensorSpec = tuple[str, str, tuple[int, ...]]

#: Copies that are moved together because they share a row range of a Hugging Face tensor.
Block = tuple[Copy, ...]


@dataclass(frozen=True)
class TargetFile:
    """A file of the target, before any data: its header, its size and the tensors that it will hold."""

    name: str
    header: bytes
    size_bytes: int
    tensors: tuple[StoredTensor, ...]


def name_at(disk: int, file: str) -> str:
    """A file's name in the plan of a target that lies on several disks."""
    return f"{disk}:{file}"


def local_name(file: str) -> str:
    """The name of a planned file on its own disk."""
    return file.partition(":")[2] or file


@dataclass(frozen=True)
class Message:
    """A stretch of the sender's buffer that the receiver needs. Sender and receiver are positions in the group."""

    sender: int
    receiver: int
    offset_bytes: int
    size_bytes: int


_FACTORS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip

#: A number without a unit is in bytes; below this it is taken for an oversight.
_LEAST_BARE = 1000


def human_bytes(size_bytes: float) -> str:
    """Decimal units, three digits: 4.97 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size_bytes) < 999.5 or unit == "TB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.3g} {unit}"


def warnings_of(notes: Iterable[str]) -> list[str]:
    """Those notes to the user that tell of something that may be wrong."""
    return [note for note in notes if note.startswith("warning: ")]


def counted(count: int, what: str, several: str = "") -> str:
    """A number of things: 1 rank, 2 ranks."""
    return f"{count:,} " + (what if count == 1 else several or f"{what}s")


def parse_bytes(text: str) -> int:
    """Bytes of "5GB" (decimal), "5GiB" (binary) or "5000000000".

    Raises:
        UsageError: not a positive size, or so few bytes without a unit that one must have been forgotten.
    """
    digits = text.strip().rstrip("abgikmtABGIKMT ")
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        size_bytes = int(float(digits) * _FACTORS[unit])
    except (ValueError, KeyError, OverflowError):
        size_bytes = 0
    if size_bytes <= 0 or (text.strip() == digits and size_bytes < _LEAST_BARE):
        what = "not a size" if size_bytes <= 0 else f"a size of {size_bytes} bytes, because it has no unit"
        raise UsageError(what, expected="a number with a unit, such as 5GB or 512MiB", found=repr(text))
    return size_bytes


def human_seconds(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def names(which: Iterable[str], shown: int = 8, between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    listed = list(which)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return between.join(listed[:shown]) + more
