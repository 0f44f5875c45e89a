"""Integer geometry of two-dimensional boxes: intersect, tile, cover, and the runs of a strided window.

Every tensor is seen as rows by columns; a vector of n elements is n rows of one column. All numbers count
elements, not bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby


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


def cover_fault(boxes: Iterable[Box], rows: int, columns: int) -> str | None:
    """Say why the boxes do not cover rows x columns exactly once each, or None if they do.

    The boxes must form bands: those that share a row share their whole row range. Copies of one parameter do.
    """
    next_row = 0
    for (row, band_rows), band in groupby(sorted(boxes, key=_position), key=lambda box: (box.row, box.rows)):
        if row != next_row:
            what = "are not covered" if row > next_row else "are covered twice"
            return f"rows {min(row, next_row)}..{max(row, next_row) - 1} {what}"
        next_column = 0
        for box in band:
            if box.column != next_column:
                what = "are not covered" if box.column > next_column else "are covered twice"
                first, last = min(box.column, next_column), max(box.column, next_column) - 1
                return f"columns {first}..{last} of rows {row}..{row + band_rows - 1} {what}"
            next_column = box.column_end
        if next_column != columns:
            return f"rows {row}..{row + band_rows - 1} are covered up to column {next_column} of {columns}"
        next_row = row + band_rows
    return None if next_row == rows else f"rows are covered up to {next_row} of {rows}"


def _position(box: Box) -> tuple[int, int, int]:
    return box.row, box.rows, box.column


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

    @property
    def elements(self) -> int:
        return len(self.starts) * self.run_elements


def runs(rows: int, columns: int, row_stride: int, column_stride: int) -> Runs:
    """Choose one read of the whole span, or one per line along the larger stride where the span is mostly gaps."""
    span = 1 + (rows - 1) * row_stride + (columns - 1) * column_stride
    if span <= 2 * rows * columns:
        return Runs(range(1), span, row_stride, column_stride)
    if row_stride >= column_stride:
        line = 1 + (columns - 1) * column_stride
        return Runs(range(0, rows * row_stride, row_stride), line, line, column_stride)
    line = 1 + (rows - 1) * row_stride
    return Runs(range(0, columns * column_stride, column_stride), line, row_stride, line, by_row=False)
