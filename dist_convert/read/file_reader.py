"""Positioned reads of exactly the bytes that a view names, packed as target values."""

import contextlib
import errno
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import torch

from dist_convert.errors import CorruptFile, PlanError, UnsupportedModel, below
from dist_convert.read.buffers import Buffer
from dist_convert.read.decode import are_numbers, decoded, has_finite_products
from dist_convert.read.record_checks import RecordChecks
from dist_convert.read.source import Listing, check_unchanged, open_to_read, reading, source_error
from dist_convert.records import DTYPE_BYTES, Box, Scales, View, runs

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Codes of quantised values, and powers of two among their scales.
_STORED_DTYPES = TORCH_DTYPES | {"F8_E4M3": torch.uint8, "U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu}
_MAX_OPEN_FILES = 64

#: Read and written at once where nothing is changed on the way: a core's own cache holds that.
PIECE_BYTES = 1 << 20

#: Of one request to read ahead: of a longer one Linux reads no more than its window for reading ahead, 128 KiB.
_AHEAD_BYTES = 128 << 10


@dataclass
class Counts:
    """What a rank has read, and the values that its casts changed beyond rounding.

    Attributes:
        read_bytes: from source files.
        overflowed: finite values that became infinite, by tensor.
        rounded_norms: norm weights that adding 1 could not represent exactly, by tensor.
    """

    read_bytes: int = 0
    overflowed: Counter[str] = field(default_factory=Counter)
    rounded_norms: Counter[str] = field(default_factory=Counter)

    def add(self, others: "Counts") -> None:
        """Count what another thread has counted as well."""
        self.read_bytes += others.read_bytes
        self.overflowed += others.overflowed
        self.rounded_norms += others.rounded_norms


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
        self.counts = Counts()
        self._root = root
        self._scratch = scratch
        self._known = known
        self._checks = checks or RecordChecks()
        self._is_last_use = is_last_use
        self._open: OrderedDict[str, int] = OrderedDict()

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, view: View, target_dtype: str, add: int, target: Buffer, offset_bytes: int) -> Mapping[str, int]:
        """Read a view, add a constant, cast, and pack the values row by row into a buffer.

        Args:
            view: what to read.
            target_dtype: safetensors name of the packed values.
            add: added to each value before the cast.
            target: the buffer.
            offset_bytes: where in the buffer, a multiple of the item size.

        Returns:
            Of `overflowed` and `rounded_norms`, what these values added to the counts; empty where nothing.

        Raises:
            CorruptFile, SourceChanged, SourceError: the file ends too early, is another one, or cannot be read; a
                quantised value is no number.
            UnsupportedModel: the elements of a row lie farther apart than the scratch buffer is long.
            PlanError: the buffer is too small.
        """
        with below(self._root):
            size_bytes = view.rows * view.columns * DTYPE_BYTES[target_dtype]
            if offset_bytes + size_bytes > len(target.memory):  # a slice would be shorter without a word
                raise PlanError(
                    "what is read does not fit into its buffer",
                    tensor=view.tensor,
                    file=view.file,
                    expected=f"{size_bytes} bytes at offset {offset_bytes}",
                    found=f"a buffer of {len(target.memory)} bytes",
                )
            self.counts.read_bytes += view.size_bytes // (view.rows if view.row_stride == 0 else 1)
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
            for kind, count in changed.items():
                getattr(self.counts, kind)[view.tensor] += count
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
            self.counts.read_bytes += len(piece)
            if first_byte + len(piece) == view.size_bytes:
                self._end(view)
            return piece, checksum

    def read_missing(self) -> None:
        """Read what records lack that were read but for a little, so that they are compared.

        Raises:
            CorruptFile, SourceChanged, SourceError: see `read`.
        """
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
        if not has_finite_products(factors, scales):
            raise _no_number(stored)
        for part, codes in self._fetch(view.codes):
            if not are_numbers(codes, scales):
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
            raise UnsupportedModel(
                "a tensor's elements lie too far apart",
                tensor=view.tensor,
                file=view.file,
                expected=f"at most {len(self._scratch.memory)} bytes from the first to the last of a block's row",
                found=f"{run_bytes} bytes",
                remedy="save the checkpoint with contiguous parameters",
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
                raise CorruptFile(
                    "the file ends inside a tensor",
                    tensor=view.tensor,
                    file=view.file,
                    expected=expected,
                    found=f"{done} bytes",
                )
            done += count
        if 1 + (view.rows - 1) * view.row_stride + (view.columns - 1) * view.column_stride <= view.rows * view.columns:
            return self._checks.add(window, view, offset_bytes)
        return None

    def _end(self, view: View) -> None:
        self._check_unchanged(view)
        # What lies between the rows of a window with gaps may still be to be read.
        if self._is_last_use and view.is_dense and hasattr(os, "posix_fadvise"):
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
    return CorruptFile(
        "a quantised weight, or a scale of one, is no finite number",
        tensor=view.tensor,
        file=view.file,
        expected=f"finite values of {view.rows} x {view.columns} elements from offset {view.offset_bytes} on",
        found="one that is infinite or not a number",
        remedy="the file is damaged, or was quantised wrongly; copy it again from where it was published",
    )


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
