"""A box of a logical tensor, put together from the regions that hold it, whatever format they are stored in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dist_convert.models.catalog import Region, cut
from dist_convert.read.buffers import Buffer
from dist_convert.read.file_reader import TORCH_DTYPES, FileReader
from dist_convert.records import DTYPE_BYTES, Box, block_tiles


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
    values = matrix(target, dtype, box.rows, box.columns)
    within = list(cut(regions, box))
    for view in (region.replicas[0] for region in within if region.replicas):
        files.read_ahead(view)
    for region in within:
        row, column = region.box.row - box.row, region.box.column - box.column
        part = values[row : row + region.box.rows, column : column + region.box.columns]
        if not region.replicas:
            part.zero_()
            continue
        view = region.replicas[0]
        is_as_stored = view.is_dense and view.dtype == dtype and not region.add
        if is_as_stored and view.columns == box.columns:
            files.read(view, dtype, 0, target, row * box.columns * DTYPE_BYTES[dtype])
            continue
        element_bytes = max(DTYPE_BYTES[dtype], DTYPE_BYTES[view.dtype])
        for tile in block_tiles(
            view.rows, view.columns, element_bytes, len(block.memory), is_transposed=view.is_transposed
        ):
            if tile.columns == box.columns:
                at_bytes = (row + tile.row) * box.columns * DTYPE_BYTES[dtype]
                files.read(view.window(tile), dtype, region.add, target, at_bytes)
                continue
            files.read(view.window(tile), dtype, region.add, block, 0)
            found = matrix(block, dtype, tile.rows, tile.columns)
            part[tile.row : tile.row_end, tile.column : tile.column_end] = found
    return values
