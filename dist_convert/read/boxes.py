"""A box of a logical tensor, put together from the regions that hold it, whatever format they are stored in."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from dist_convert.models.catalog import Region, cut
from dist_convert.read.buffers import Buffer
from dist_convert.read.file_reader import TORCH_DTYPES, FileReader
from dist_convert.records import DTYPE_BYTES, Box, View, alternating, block_tiles

#: Of one element, whatever its dtype.
_WIDEST_BYTES = 8


def matrix(buffer: Buffer, dtype: str, rows: int, columns: int) -> torch.Tensor:
    """The beginning of a buffer as rows x columns values."""
    return buffer.tensor[: rows * columns * DTYPE_BYTES[dtype]].view(TORCH_DTYPES[dtype]).view(rows, columns)


def read_box(
    files: FileReader, regions: Sequence[Region], box: Box, dtype: str, target: Buffer, block: Buffer
) -> torch.Tensor:
    """Fill a buffer with a box of a tensor, row by row, from the first replica of each region.

    Args:
        files: reader of the files, with twice the scratch that `block` has.
        regions: of the tensor; they cover the box.
        box: what is read.
        dtype: safetensors name of the values in the buffer.
        target: the buffer, which is large enough.
        block: for values that are put beside others.

    Returns:
        The values as rows x columns of the buffer.

    Raises:
        SourceError: see `FileReader.read`.
    """
    values, row_bytes = matrix(target, dtype, box.rows, box.columns), box.columns * DTYPE_BYTES[dtype]
    reads = list(reads_of(cut(regions, box), len(block.memory)))
    for ahead in (view for view, _ in reads if view):
        files.read_ahead(ahead)
    for view, together in reads:
        boxes = [replace(one.box, row=one.box.row - box.row, column=one.box.column - box.column) for one in together]
        parts = [values[part.row : part.row_end, part.column : part.column_end] for part in boxes]
        if view is None:
            parts[0].zero_()
            continue
        add, fills_rows = together[0].add, view.columns == box.columns and len(parts) == 1
        if fills_rows and view.is_dense and view.dtype == dtype and not add:
            files.read(view, dtype, 0, target, boxes[0].row * row_bytes)
            continue
        element_bytes = max(DTYPE_BYTES[dtype], DTYPE_BYTES[view.dtype])
        for tile in block_tiles(
            view.rows, view.columns, element_bytes, len(block.memory), is_transposed=view.is_transposed
        ):
            if fills_rows and tile.columns == box.columns:
                files.read(view.window(tile), dtype, add, target, (boxes[0].row + tile.row) * row_bytes)
                continue
            files.read(view.window(tile), dtype, add, block, 0)
            found = matrix(block, dtype, tile.rows, tile.columns).chunk(len(parts), dim=1)
            for part, its in zip(parts, found, strict=True):
                part[tile.row : tile.row_end, tile.column : tile.column + its.shape[1]] = its
    return values


def reads_of(regions: Iterable[Region], block_bytes: int) -> Iterator[tuple[View | None, tuple[Region, ...]]]:
    """What is read for regions, of the first replica of each, and for which of them; None for zeros.

    Two whose rows alternate in the file, as the halves of a head in Meta's order do, are one read without gaps, in
    whose rows they lie side by side, if a block holds one.
    """
    waiting = deque(regions)
    while waiting:
        first = waiting.popleft()
        view = first.replicas[0] if first.replicas else None
        joined = None
        if view and waiting and waiting[0].replicas and waiting[0].add == first.add:
            joined = alternating(view, waiting[0].replicas[0])
        if joined and joined.columns * _WIDEST_BYTES <= block_bytes:
            yield joined, (first, waiting.popleft())
        else:
            yield view, (first,)
