"""Where a window of a tensor lies whose chunks are cut at any rows, columns and experts, by torch's own indexing."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from dist_convert.formats.dcp.chunks import Stored, StoredChunk
from dist_convert.records import StoredTensor, View, row_major

SHAPE = (3, 6, 10)
#: Every element is its own number in the file.
WHOLE = torch.arange(180).view(SHAPE)


def stored(*borders: tuple[int, ...]) -> Stored:
    """A tensor in chunks that end at these borders of each axis, one after the other in one file of I64."""
    chunks, first = [], 0
    spans = [list(pairwise((0, *ends, size))) for ends, size in zip(borders, SHAPE, strict=True)]
    for box in product(*spans):
        sizes = tuple(end - start for start, end in box)
        place = StoredTensor("w", "f", "I64", sizes, row_major(sizes), 8 * first)
        chunks.append(StoredChunk(tuple(start for start, _ in box), place))
        first += place.elements
    return Stored("w", "I64", SHAPE, tuple(chunks))


def content_of(tensor: Stored) -> torch.Tensor:
    """The file, as its chunks hold the whole."""
    parts = []
    for chunk in tensor.chunks:
        box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.place.shape, strict=True))
        parts.append(WHOLE[box].flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("borders", [((), (), ()), ((2,), (1, 4), ()), ((1, 2), (5,), (3, 4)), ((), (), (1, 2, 3, 9))])
@pytest.mark.parametrize(
    ("window", "first", "rows", "columns", "strides"),
    [
        (WHOLE[1, 2:5], 80, 3, 10, (10, 1)),
        (WHOLE[2, 1::2, 3:7], 133, 3, 4, (20, 1)),  # every other row
        (WHOLE[0].T, 0, 10, 6, (1, 10)),  # turned
        (WHOLE[1, :, 1::2].T, 61, 5, 6, (2, 10)),  # turned, every other of its rows
    ],
)
def test_the_regions_of_a_window_are_what_torch_finds_there(
    window: torch.Tensor,
    first: int,
    rows: int,
    columns: int,
    strides: tuple[int, int],
    borders: tuple[tuple[int, ...], ...],
) -> None:
    tensor = stored(*borders)
    content = content_of(tensor)
    found = torch.full((rows, columns), -1)
    for region in tensor.regions(View("f", "w", "I64", 8 * first, rows, columns, *strides)):
        [view], box = region.replicas, region.box
        values = content.as_strided(
            (view.rows, view.columns), (view.row_stride, view.column_stride), view.offset_bytes // 8
        )
        assert (found[box.row : box.row_end, box.column : box.column_end] == -1).all()
        found[box.row : box.row_end, box.column : box.column_end] = values
    assert torch.equal(found, window)
