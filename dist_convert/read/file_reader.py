"""Positioned reads of exactly the bytes that a view names, packed as target values, and the memory for them."""

import contextlib
import errno
import math
import mmap
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from dist_convert.errors import CorruptFile, PlanError, UnsupportedModel, below
from dist_convert.models.catalog import Region, cut
from dist_convert.read.record_checks import RecordChecks
from dist_convert.read.source import Listing, check_unchanged, open_to_read, reading, source_error
from dist_convert.records import DTYPE_BYTES, Box, Scales, View, alternating, block_tiles, runs

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Codes of quantised values, and powers of two among their scales.
_STORED_DTYPES = TORCH_DTYPES | {"F8_E4M3": torch.uint8, "U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu}
_MAX_OPEN_FILES = 64

#: Read and written at once where nothing is changed on the way: a core's own cache holds that.
PIECE_BYTES = 1 << 20

#: Of one request to read ahead: of a longer one Linux reads no more than its window for reading ahead, 128 KiB.
_AHEAD_BYTES = 128 << 10


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Buffer:
    """The same memory as bytes for system calls and as a uint8 tensor for torch."""

    memory: memoryview
    tensor: torch.Tensor


def make_buffer(size_bytes: int, device: torch.device = CPU) -> Buffer:
    """A page-aligned buffer of at least one byte in the host's memory.

    For the CPU pages are taken when they are first used, and large ones where the system has them: taking 4 KiB at a
    time costs as much as reading into them. For an accelerator they are pinned, so that its copies need no detour
    through memory of the driver's own.
    """
    if device.type != "cpu":
        try:
            pinned = torch.empty(max(1, size_bytes), dtype=torch.uint8, pin_memory=True)
            return Buffer(pinned.numpy().data, pinned)
        except RuntimeError:
            pass  # pinning is limited (`ulimit -l`) or not offered: pageable memory is slower, no more
    memory = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE)
    with contextlib.suppress(OSError):  # it is advice, which a kernel may be built without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return Buffer(memoryview(memory), torch.frombuffer(memory, dtype=torch.uint8))


@dataclass(frozen=True)
class Slot:
    """The buffers of one step on its way: what this rank reads, and what its group gathers."""

    data: Buffer
    received: Buffer


#: Quantised values are decoded as their publishers' own code does (docs/formats.md, "Quantised weights"): the value of
#: a code times the scale of its block, in float32; rounding to the target's dtype comes after that, once.

#: Of the codes of one tile, so that what is computed on the way stays in the processor's cache.
_TILE_BYTES = 1 << 17

_BYTES = torch.arange(256)
#: The values of each byte of two codes of E2M1, of which the lower four bits come first, as one item:
#: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf, 5.3.3.
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_TWO_E2M1 = torch.stack([_E2M1[_BYTES % 16], _E2M1[_BYTES // 16]], 1).view(torch.int64).flatten()
#: The largest value of a code, by the number of codes in a byte.
_LARGEST = {1: 448, 2: 6}
#: F8_E4M3 has the exponent's bias 7, float16 15, so the same bits stand for so much more:
#: https://arxiv.org/abs/2209.05433, table 1.
_E4M3_BY_FLOAT16 = 256


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
    bytes_of_row, is_fp8 = codes.shape[1], scales.packed == 1
    columns = (scales.column + torch.arange(part.column, part.column_end)) // scales.block_columns
    first = (scales.column + part.column) % scales.packed  # of the codes in a byte
    most_rows = max(1, _TILE_BYTES // bytes_of_row)
    # Made once: taking pages from the system costs as much as what is done in them.
    shape = (min(most_rows, part.rows), bytes_of_row)
    wider = torch.empty(shape, dtype=torch.int16 if is_fp8 else torch.int32)
    found = torch.empty(shape, dtype=torch.float32 if is_fp8 else torch.int64)
    factors = factors * (_E4M3_BY_FLOAT16 if is_fp8 else 1)
    row = part.row
    while row < part.row_end:
        block, inside = divmod(scales.row + row, scales.block_rows)
        rows = min(most_rows, part.row_end - row)
        if scales.block_rows > 1:  # all rows of a tile have the same scales, or each has its own
            rows = min(rows, scales.block_rows - inside)
        of_tile = factors[block : block + (inside + rows - 1) // scales.block_rows + 1]
        tile = codes[row - part.row : row - part.row + rows]
        if is_fp8:  # sign, exponent and fraction to where float16 has them
            bits = wider[:rows].copy_(tile.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(~0x4000)
            of_codes = found[:rows].copy_(bits.view(torch.float16))
        else:
            index = wider[:rows].copy_(tile).flatten()
            of_codes = torch.index_select(_TWO_E2M1, 0, index, out=found[:rows].flatten()).view(rows, -1)
            of_codes = of_codes.view(torch.float32)
        values = of_codes[:, first : first + part.columns].mul_(of_tile.index_select(1, columns))
        yield Box(row, part.column, rows, part.columns), values
        row += rows


class FileReader:
    """Reads views of the files below one directory, of which it keeps some open; not for two threads at once.

    Args:
        root: the directory.
        scratch: for values that are not read straight to where they go.
        known: files whose values count only if they have not changed after they were read.
        checks: what is told of all that is read without gaps.
        is_last_use: what was read leaves the page cache, see `source.pushes_others_out`.
    """

    def __init__(
        self,
        root: Path,
        scratch: Buffer,
        known: Listing = MappingProxyType({}),
        checks: RecordChecks | None = None,
        *,
        is_last_use: bool = False,
    ) -> None:
        self.read_bytes = 0
        self._root = root
        self._scratch = scratch
        self._known = known
        self._checks = checks or RecordChecks()
        self._is_last_use = is_last_use
        self._open = OrderedDict[str, int]()

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, view: View, target_dtype: str, add: int, target: Buffer, offset_bytes: int) -> Mapping[str, int]:
        """Read a view, add a constant, cast, and pack the values row by row into a buffer.

        Args:
            target_dtype: safetensors name of the packed values.
            add: added to each value before the cast.
            offset_bytes: where in the buffer, a multiple of the item size.

        Returns:
            How many values the cast changed beyond rounding, where it did: finite ones that became infinite are
            "overflowed", norm weights that adding 1 could not represent exactly "rounded_norms".

        Raises:
            CorruptFile, SourceChanged, SourceError: the file ends too early, is another one, or cannot be read; a
                quantised value is no number.
            UnsupportedModel: the elements of a row lie farther apart than the scratch buffer is long.
            PlanError: the buffer is too small.
        """
        with below(self._root):
            size_bytes = view.rows * view.columns * DTYPE_BYTES[target_dtype]
            if offset_bytes + size_bytes > len(target.memory):  # a slice would be shorter without a word
                what, found = "the data read does not fit into its buffer", f"a buffer of {len(target.memory)} bytes"
                expected = f"{size_bytes} bytes at offset {offset_bytes}"
                raise PlanError(what, view.file, expected, found, tensor=view.tensor)
            self.read_bytes += view.size_bytes // (view.rows if view.row_stride == 0 else 1)
            if view.is_dense and view.dtype == target_dtype and not add:
                self._read_into(target.memory[offset_bytes : offset_bytes + size_bytes], view, view.offset_bytes)
                self._end(view)
                return {}
            packed = target.tensor[offset_bytes : offset_bytes + size_bytes].view(TORCH_DTYPES[target_dtype])
            matrix = packed.view(view.rows, view.columns)
            changed = Counter[str]()
            for box, values in self._fetch(view) if view.scales is None else self._decoded(view, view.scales):
                changed += _place(values, matrix[box.row : box.row_end, box.column : box.column_end], add)
            self._end(view.codes)
            return changed

    def read_piece(self, view: View, first_byte: int) -> tuple[memoryview, int | None]:
        """The next `PIECE_BYTES` of a dense view, or its last bytes, which are there until something else is read.

        Returns:
            The bytes, and their CRC-32, if it was worked out.

        Raises:
            CorruptFile, SourceChanged, SourceError: see `read`.
        """
        with below(self._root):
            piece = self._scratch.memory[: min(PIECE_BYTES, view.size_bytes - first_byte)]
            checksum = self._read_into(piece, view, view.offset_bytes + first_byte)
            self.read_bytes += len(piece)
            if first_byte + len(piece) == view.size_bytes:
                self._end(view)
            return piece, checksum

    def read_missing(self) -> None:
        """Read what records lack that were read but for a little, so that they are compared; raises as `read` does."""
        with below(self._root):
            for view, offset_bytes, size_bytes in list(self._checks.little_missing()):
                for first in range(0, size_bytes, len(self._scratch.memory)):
                    window = self._scratch.memory[: size_bytes - first]
                    self._read_into(window, view, offset_bytes + first)
                self._check_unchanged(view)

    def read_ahead(self, view: View) -> None:
        """Have the operating system begin to read what is read whole soon, unless it has it; it may do so, or not."""
        end_bytes = view.codes.offset_at(view.rows - 1, view.columns)
        if not hasattr(os, "RWF_NOWAIT") or end_bytes - view.offset_bytes > 2 * view.size_bytes:
            return
        with contextlib.suppress(OSError):  # reading it says what is wrong
            descriptor = self._descriptor(view.file)
            middle = (view.offset_bytes + end_bytes) // 2  # both ends may be there for what lies beside them
            if not _is_cached(descriptor, middle):
                for start in range(view.offset_bytes, end_bytes, _AHEAD_BYTES):
                    size_bytes = min(_AHEAD_BYTES, end_bytes - start)
                    os.posix_fadvise(descriptor, start, size_bytes, os.POSIX_FADV_WILLNEED)

    def _decoded(self, view: View, scales: Scales) -> Iterator[tuple[Box, torch.Tensor]]:
        """The values that a quantised view stands for."""
        stored = scales.of(view.rows, view.columns)
        factors = torch.empty(stored.rows, stored.columns)
        for box, values in self._fetch(stored):
            factors[box.row : box.row_end, box.column : box.column_end] = values
        self._check_unchanged(stored)
        if not torch.isfinite(factors * _LARGEST[scales.packed]).all():  # a code would be too large for float32
            raise _no_number(stored)
        for part, codes in self._fetch(view.codes):
            # Of E4M3 0x7f and 0xff are NaN.
            if scales.packed == 1 and (int(codes.max()) == 0xFF or int(codes.view(torch.int8).max()) == 0x7F):
                raise _no_number(view)
            yield from decoded(
                codes, replace(part, columns=view.columns) if scales.packed > 1 else part, factors, scales
            )

    def _fetch(self, view: View) -> Iterator[tuple[Box, torch.Tensor]]:
        """The view's values as strided tensors over the scratch buffer, in as few parts as fit it."""
        fetched = runs(view.rows, view.columns, view.row_stride, view.column_stride)
        item_bytes = DTYPE_BYTES[view.dtype]
        run_bytes = fetched.run_elements * item_bytes
        runs_per_part = len(self._scratch.memory) // run_bytes
        if not runs_per_part:
            what, remedy = "a tensor's elements lie too far apart", "save the checkpoint with contiguous parameters"
            expected = f"at most {len(self._scratch.memory)} bytes from the first to the last of a block's row"
            raise UnsupportedModel(
                what, view.file, expected, tensor=view.tensor, found=f"{run_bytes} bytes", remedy=remedy
            )
        values = self._scratch.tensor.view(_STORED_DTYPES[view.dtype])
        for first in range(0, len(fetched.starts), runs_per_part):
            starts = fetched.starts[first : first + runs_per_part]
            for number, start in enumerate(starts):
                window = self._scratch.memory[number * run_bytes : (number + 1) * run_bytes]
                self._read_into(window, view, view.offset_bytes + start * item_bytes)
            if len(fetched.starts) == 1:
                box = Box(0, 0, view.rows, view.columns)
            elif fetched.by_row:
                box = Box(first, 0, len(starts), view.columns)
            else:
                box = Box(0, first, view.rows, len(starts))
            yield box, values.as_strided((box.rows, box.columns), (fetched.row_stride, fetched.column_stride))

    def _read_into(self, window: memoryview, view: View, offset_bytes: int) -> int | None:
        """Fill a window; the CRC-32 of what was read, if it was worked out."""
        done = 0
        expected = f"{len(window)} bytes at offset {offset_bytes}"
        while done < len(window):
            try:
                count = os.preadv(self._descriptor(view.file), [window[done:]], offset_bytes + done)
            except OSError as error:
                if error.errno == errno.ESPIPE:  # it is no file any more
                    self._check_unchanged(view)
                raise source_error(error, view.file, tensor=view.tensor, expected=expected) from error
            if count == 0:
                self._check_unchanged(view)
                what = "the file ends inside a tensor"
                raise CorruptFile(what, view.file, expected, tensor=view.tensor, found=f"{done} bytes")
            done += count
        if 1 + (view.rows - 1) * view.row_stride + (view.columns - 1) * view.column_stride <= view.rows * view.columns:
            try:
                return self._checks.add(window, view, offset_bytes)
            except CorruptFile:  # which another file in its place may be the reason for
                self._check_unchanged(view)
                raise
        return None

    def _end(self, view: View) -> None:
        self._check_unchanged(view)
        # What lies between the rows of a window with gaps may still be to be read.
        if self._is_last_use and view.is_dense:
            with contextlib.suppress(OSError):  # it is advice
                descriptor = self._descriptor(view.file)
                os.posix_fadvise(descriptor, view.offset_bytes, view.size_bytes, os.POSIX_FADV_DONTNEED)

    def _check_unchanged(self, view: View) -> None:
        if (known := self._known.get(view.file)) is not None:
            with reading(view.file, view.tensor):
                found = os.fstat(self._descriptor(view.file))
            check_unchanged(found, known, view.file, view.tensor)

    def _descriptor(self, file: str) -> int:
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            descriptor = open_to_read(self._root / file)
            if len(self._open) >= _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open[file] = descriptor
        return descriptor


def _is_cached(descriptor: int, offset_bytes: int) -> bool:
    """Whether a byte is known to be in memory; not so where the file system cannot tell."""
    try:
        os.preadv(descriptor, [bytearray(1)], offset_bytes, os.RWF_NOWAIT)
    except OSError:
        return False
    return True


def _no_number(view: View) -> CorruptFile:
    what, found = "a quantised weight, or its scale, is not a finite number", "an infinity or NaN"
    expected = f"finite values of {view.rows} x {view.columns} elements from offset {view.offset_bytes} on"
    remedy = "the file is damaged, or was quantised wrongly; copy it again from where it was published"
    return CorruptFile(what, view.file, expected, found, remedy, tensor=view.tensor)


def _place(values: torch.Tensor, target: torch.Tensor, add: int) -> Counter[str]:
    """Cast contiguous values, so that every element takes the same path whatever the strides; what that has changed."""
    changed = Counter[str]()
    if values.dtype == target.dtype and not add:
        target.copy_(values)
        return changed
    exact = values.contiguous()
    if add:
        exact = exact.to(torch.float64) + add
    cast = target if target.is_contiguous() else torch.empty_like(exact, dtype=target.dtype)
    cast.copy_(exact)
    # If any value is infinite or not a number, so is an extreme, and those are found ten times as fast.
    if not all(math.isfinite(extreme) for extreme in torch.aminmax(cast)):
        changed["overflowed"] = int((torch.isinf(cast) & torch.isfinite(exact)).sum())
    if add:
        changed["rounded_norms"] = int((cast.to(torch.float64) != exact).sum())
    if cast is not target:
        target.copy_(cast)
    return changed


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
