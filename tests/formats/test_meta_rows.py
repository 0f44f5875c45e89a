"""Heads whose rows alternate, as Meta rotates them: where each row lies, and that both halves are one read or write."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dist_convert.compare.blocks import BLOCK_BYTES as COMPARED_BYTES
from dist_convert.models.catalog import Region, cut, from_neighbours
from dist_convert.plan.copies import BLOCK_BYTES, Ends, Stored, bands_of, blocks_of_band
from dist_convert.read.file_reader import reads_of
from dist_convert.records import Box, View, block_tiles, runs


def region(first: int, rows: int, columns: int = 3, file: str = "in") -> Region:
    """Rows of a BF16 matrix that lie one after the other from byte 100 on, the tensor's first row there."""
    view = View(file, "w", "BF16", 100 + first * columns * 2, rows, columns, columns, 1)
    return Region(Box(first, 0, rows, columns), (view,))


def stored_rows(regions: tuple[Region, ...], columns: int = 3) -> dict[int, int]:
    """Row of the tensor -> row of the stored matrix."""
    found: dict[int, int] = {}
    for one in regions:
        for row in range(one.box.rows):
            [view] = one.window(Box(one.box.row + row, 0, 1, columns))
            found[one.box.row + row] = (view.offset_bytes - 100) // (2 * columns)
    return found


@pytest.mark.parametrize("borders", [(0, 16), (0, 8, 16), (0, 3, 16), (0, 1, 2, 9, 15, 16), tuple(range(17))])
def test_every_other_row_of_a_head_is_a_half_of_it_wherever_the_rows_are_cut(borders: tuple[int, ...]) -> None:
    heads, head_dim = 2, 8
    # transformers' own formula: view(heads, d / 2, 2).transpose(1, 2)
    expected = torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).flatten().tolist()
    cut = [region(first, end - first) for first, end in pairwise(borders)]
    found = from_neighbours(cut, head_dim)
    assert stored_rows(found) == dict(enumerate(expected))
    assert [one.box.row for one in found] == sorted(one.box.row for one in found)


def test_both_halves_of_a_head_are_one_read_without_gaps() -> None:
    stored = from_neighbours([region(0, 16)], 8)
    whole = (region(0, 16, file="out"),)
    for source, target, ends in ((stored, whole, "sources"), (whole, stored, "targets")):
        pair = Ends(Shards(), Shards())  # type: ignore[arg-type]
        found = bands_of(pair, [Stored(source, target, (), ())])
        assert [len(band) for band in found] == [2, 2]
        for band in found:
            views = [getattr(copy, ends)[0] for copy in band]
            assert [(view.rows, view.columns, view.row_stride) for view in views] == [(4, 3, 6)] * 2
            assert views[1].offset_bytes - views[0].offset_bytes == 3 * 2


class Shards:
    """A catalog as far as the order of bands asks for it."""

    is_owned = True


def test_blocks_of_long_rows_keep_both_halves_together() -> None:
    columns = BLOCK_BYTES // 8
    stored = from_neighbours([region(0, 8, columns)], 8)
    [band] = bands_of(Ends(Shards(), Shards()), [Stored(stored, (region(0, 8, columns, "out"),), (), ())])  # type: ignore[arg-type]
    blocks = list(blocks_of_band(band, {"out"}))
    assert [[copy.rows for copy in block] for block in blocks] == [[2, 2], [2, 2]]


def test_columns_of_a_plain_matrix_are_joined_as_before() -> None:
    """Rows of two regions side by side in one stored matrix of which they are not all."""
    left, right = (View("in", "w", "BF16", 100 + 4 * n, 2, 2, 6, 1) for n in range(2))
    source = (Region(Box(0, 0, 2, 2), (left,)), Region(Box(2, 0, 2, 2), (right,)))
    target = (Region(Box(0, 0, 4, 2), (View("out", "w", "BF16", 0, 4, 2, 2, 1),)),)
    found = bands_of(Ends(Shards(), Shards()), [Stored(source, target, (), ())])  # type: ignore[arg-type]
    assert [len(band) for band in found] == [1, 1]


#: Hidden size and rows of a head of published models: Llama 3.2 1B and 3B, Llama 2 7B and 13B, Llama 3 70B and 405B.
PUBLISHED = [(2048, 64), (3072, 128), (4096, 128), (5120, 128), (8192, 128), (16384, 128)]


@pytest.mark.parametrize(("hidden", "head_dim"), PUBLISHED)
def test_blocks_that_are_compared_read_every_byte_about_once(hidden: int, head_dim: int) -> None:
    rows = 8 * head_dim
    stored = from_neighbours([region(0, rows, hidden)], head_dim)
    read = 0
    for box in block_tiles(rows, hidden, 2, COMPARED_BYTES):
        for view, _ in reads_of(cut(stored, box), COMPARED_BYTES):
            assert view is not None
            fetched = runs(view.rows, view.columns, view.row_stride, view.column_stride)
            read += len(fetched.starts) * fetched.run_elements
    assert read == rows * hidden
