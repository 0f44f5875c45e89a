"""Positioned writes of target rows into files that already have their final size."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from pathlib import Path

from isal import isal_zlib

from dist_convert.errors import NotEnoughSpace, PlanError, TargetError
from dist_convert.plan.node_local import local_name
from dist_convert.records import DTYPE_BYTES, View

_MAX_OPEN_FILES = 64


class FileWriter:
    """Writes views of the files below one directory; keeps a limited number of them open.

    Not for use by two threads at once. `checksums` holds (file, offset, length, CRC-32) of contiguous writes where
    they are kept.
    """

    def __init__(self, root: Path, *, keep_checksums: bool) -> None:
        self.written_bytes = 0
        self.checksums: list[tuple[str, int, int, int]] = []
        self._keep_checksums = keep_checksums
        self._root = root
        self._open: OrderedDict[str, int] = OrderedDict()

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def write(self, view: View, packed: memoryview) -> None:
        """Write values that lie row after row in memory to where the view says.

        Raises:
            PlanError: the columns of a row are apart in the file.
            NotEnoughSpace, TargetError: the file system refuses.
        """
        if view.is_transposed:
            raise PlanError("a transposed window is written by its columns", tensor=view.tensor, file=view.file)
        row_bytes = view.columns * DTYPE_BYTES[view.dtype]
        if view.is_dense:
            self._write_at(view, packed, view.offset_bytes)
            if self._keep_checksums:
                self.checksums.append((view.file, view.offset_bytes, len(packed), isal_zlib.crc32(packed)))
        else:
            step_bytes = view.row_stride * DTYPE_BYTES[view.dtype]
            for row in range(view.rows):
                line = packed[row * row_bytes : (row + 1) * row_bytes]
                self._write_at(view, line, view.offset_bytes + row * step_bytes)
        self.written_bytes += len(packed)

    def _write_at(self, view: View, data: memoryview, offset_bytes: int) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptor(view.file), data[done:], offset_bytes + done)
            except OSError as error:
                raise target_error(error, view.file) from error

    def _descriptor(self, file: str) -> int:
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            descriptor = os.open(self._root / local_name(file), os.O_WRONLY)
            if len(self._open) >= _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open[file] = descriptor
        return descriptor


def target_error(error: OSError, file: str) -> TargetError:
    """The error of ours for an operating system's refusal to write."""
    kind = NotEnoughSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else TargetError
    return kind(
        "cannot write the target",
        file=file,
        found=error.strerror or str(error),
        remedy="free space or choose another target; nothing is left under the final name",
    )
