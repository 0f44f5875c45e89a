"""What quantised weights stand for, as their publishers' own code computes it (docs/formats.md, "Quantised weights").

The value of a code times the scale of its block, in float32; rounding to the target's dtype comes after that, once.
"""

from collections.abc import Iterator

import torch

from dist_convert.records import Box, Scales

#: Of the codes of one tile, so that what is computed on the way stays in the processor's cache.
_TILE_BYTES = 1 << 17

_BYTES = torch.arange(256)
#: The value of each code of F8_E4M3: https://arxiv.org/abs/2209.05433, table 1.
_E4M3 = _BYTES.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
#: The values of each byte of two codes of E2M1, of which the lower four bits come first, as one item:
#: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf, 5.3.3.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_TWO_E2M1 = torch.stack([_E2M1[_BYTES % 16], _E2M1[_BYTES // 16]], 1).view(torch.int64).flatten()
#: By the number of codes in a byte: what bytes stand for, and the largest value.
_TABLES, _LARGEST = {1: _E4M3, 2: _TWO_E2M1}, {1: 448, 2: 6}


def has_finite_products(factors: torch.Tensor, scales: Scales) -> bool:
    """Whether scales are numbers that no code makes too large for float32."""
    return bool(torch.isfinite(factors * _LARGEST[scales.packed]).all())


def are_numbers(codes: torch.Tensor, scales: Scales) -> bool:
    """Whether no code stands for NaN: of E4M3 0x7f and 0xff do."""
    return scales.packed > 1 or (int(codes.max()) < 0xFF and int(codes.view(torch.int8).max()) < 0x7F)


def decoded(
    codes: torch.Tensor, part: Box, factors: torch.Tensor, scales: Scales
) -> Iterator[tuple[Box, torch.Tensor]]:
    """The values of a part of a quantised view, tile by tile, as float32.

    Args:
        codes: of the part, rows x bytes.
        part: which rows and columns of the view it is.
        factors: all scales of the view as float32, one for each block.
        scales: where in its block the view begins, and how large blocks are.

    Yields:
        Boxes of the view that cover the part, and their values, which last until the next are asked for.
    """
    table, bytes_of_row = _TABLES[scales.packed], codes.shape[1]
    columns = (scales.column + torch.arange(part.column, part.column_end)) // scales.block_columns
    first = (scales.column + part.column) % scales.packed  # of the codes in a byte
    most_rows = max(1, _TILE_BYTES // bytes_of_row)
    # Made once: taking pages from the system costs as much as what is done in them.
    indices = torch.empty(min(most_rows, part.rows), bytes_of_row, dtype=torch.int32)
    looked_up = torch.empty(indices.numel(), dtype=table.dtype)
    row = part.row
    while row < part.row_end:
        block, inside = divmod(scales.row + row, scales.block_rows)
        rows = min(most_rows, part.row_end - row)
        if scales.block_rows > 1:  # all rows of a tile have the same scales, or each has its own
            rows = min(rows, scales.block_rows - inside)
        of_tile = factors[block : block + (inside + rows - 1) // scales.block_rows + 1]
        index = indices[:rows].copy_(codes[row - part.row : row - part.row + rows]).flatten()
        found = torch.index_select(table, 0, index, out=looked_up[: len(index)]).view(torch.float32).view(rows, -1)
        values = found[:, first : first + part.columns].mul_(of_tile.index_select(1, columns))
        yield Box(row, part.column, rows, part.columns), values
        row += rows
