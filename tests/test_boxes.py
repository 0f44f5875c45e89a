"""Boxes: tiles and covers are exact, and the runs of a strided window fetch exactly its elements."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from dist_convert.records import Box, cover_fault, intersect, runs, tiles

sizes = st.integers(1, 12)
boxes = st.builds(Box, st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4))


def painted(listed: list[Box], rows: int, columns: int) -> np.ndarray:
    """How often each element of rows x columns lies in a box."""
    counts = np.zeros((rows, columns), dtype=int)
    for box in listed:
        counts[box.row : box.row + box.rows, box.column : box.column + box.columns] += 1
    return counts


def test_tiles_come_row_by_row_and_the_last_ones_are_smaller() -> None:
    assert list(tiles(3, 5, 2, 4)) == [Box(0, 0, 2, 4), Box(0, 4, 2, 1), Box(2, 0, 1, 4), Box(2, 4, 1, 1)]


@given(rows=sizes, columns=sizes, tile_rows=sizes, tile_columns=sizes)
def test_tiles_cover_every_element_once(rows: int, columns: int, tile_rows: int, tile_columns: int) -> None:
    listed = list(tiles(rows, columns, tile_rows, tile_columns))
    assert (painted(listed, rows, columns) == 1).all()
    assert all(box.rows <= tile_rows and box.columns <= tile_columns for box in listed)


def test_boxes_that_only_touch_have_no_common_part() -> None:
    assert intersect(Box(0, 0, 2, 2), Box(0, 2, 2, 2)) is None
    assert intersect(Box(0, 0, 2, 2), Box(2, 0, 2, 2)) is None


@given(first=boxes, second=boxes)
def test_the_common_part_of_two_boxes_is_where_both_are(first: Box, second: Box) -> None:
    common = intersect(first, second)
    both = painted([first], 9, 9) * painted([second], 9, 9)
    assert (both == painted([common] if common else [], 9, 9)).all()


@pytest.mark.parametrize(
    ("listed", "fault"),
    [
        ([Box(0, 0, 2, 3), Box(3, 0, 1, 3)], "rows 2..2 are not covered"),
        ([Box(1, 0, 3, 3)], "rows 0..0 are not covered"),
        ([Box(0, 0, 3, 3), Box(2, 0, 2, 3)], "rows 2..2 are covered twice"),
        ([Box(0, 0, 2, 3)], "rows are covered up to 2 of 4"),
        ([Box(0, 0, 5, 3)], "rows are covered up to 5 of 4"),
        ([Box(0, 0, 4, 1), Box(0, 2, 4, 1)], "columns 1..1 of rows 0..3 are not covered"),
        ([Box(0, 0, 4, 2), Box(0, 1, 4, 2)], "columns 1..1 of rows 0..3 are covered twice"),
        ([Box(0, 0, 4, 2)], "rows 0..3 are covered up to column 2 of 3"),
        ([], "rows are covered up to 0 of 4"),
    ],
)
def test_a_fault_says_which_rows_or_columns_and_whether_a_hole_or_an_overlap(listed: list[Box], fault: str) -> None:
    assert cover_fault(listed, 4, 3) == fault


@given(data=st.data(), columns=sizes)
def test_bands_of_boxes_in_any_order_are_an_exact_cover(data: st.DataObject, columns: int) -> None:
    listed, row = [], 0
    for band_rows in data.draw(st.lists(sizes, min_size=1, max_size=4)):
        cuts = sorted({0, columns, *data.draw(st.lists(st.integers(0, columns), max_size=3))})
        listed += [Box(row, first, band_rows, end - first) for first, end in pairwise(cuts)]
        row += band_rows
    assert cover_fault(data.draw(st.permutations(listed)), row, columns) is None


@given(listed=st.lists(boxes, max_size=6))
def test_boxes_that_do_not_cover_every_element_once_are_never_called_a_cover(listed: list[Box]) -> None:
    counts = painted(listed, 9, 9)
    rows, columns = max((b.row_end for b in listed), default=1), max((b.column_end for b in listed), default=1)
    if not (counts[:rows, :columns] == 1).all():
        assert cover_fault(listed, rows, columns) is not None


@given(rows=sizes, columns=sizes, row_stride=st.integers(0, 40), column_stride=st.integers(0, 40))
def test_runs_of_any_strides_fetch_exactly_the_window(
    rows: int, columns: int, row_stride: int, column_stride: int
) -> None:
    stored = np.arange(12 * 40 * 2 + 1, dtype=np.int64)
    expected = as_strided(stored, (rows, columns), (row_stride * 8, column_stride * 8))
    fetched = runs(rows, columns, row_stride, column_stride)
    packed = np.concatenate([stored[start : start + fetched.run_elements] for start in fetched.starts])
    assert len(fetched.starts) * fetched.run_elements == len(packed)
    assert (fetched.row_stride * (rows - 1) + fetched.column_stride * (columns - 1)) < len(packed)
    last = (rows - 1) * row_stride + (columns - 1) * column_stride
    assert fetched.starts[-1] + fetched.run_elements <= last + 1, "nothing is read beyond the window: a file may end"
    found = as_strided(packed, (rows, columns), (fetched.row_stride * 8, fetched.column_stride * 8))
    assert (found == expected).all()


@given(rows=sizes, columns=sizes, gap=st.integers(0, 40))
def test_a_window_with_contiguous_lines_is_fetched_with_at_most_as_much_again(
    rows: int, columns: int, gap: int
) -> None:
    fetched = runs(rows, columns, columns + gap, 1)
    assert len(fetched.starts) * fetched.run_elements <= 2 * rows * columns
    across = runs(rows, columns, 1, rows + gap)
    assert len(across.starts) * across.run_elements <= 2 * rows * columns


def test_a_dense_window_is_one_run() -> None:
    assert list(runs(3, 4, 4, 1).starts) == [0]
    assert runs(3, 4, 4, 1).run_elements == 12


def test_a_window_of_a_wide_matrix_is_one_run_a_row() -> None:
    assert list(runs(3, 4, 100, 1).starts) == [0, 100, 200]
    assert runs(3, 4, 100, 1).run_elements == 4


def test_a_window_of_a_tall_transposed_matrix_is_one_run_a_column() -> None:
    assert list(runs(3, 4, 1, 100).starts) == [0, 100, 200, 300]
    assert runs(3, 4, 1, 100).run_elements == 3
