"""Positioned writes of target rows into files that already have their final size."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from pathlib import Path

from isal import isal_zlib

from dist_convert.errors import NotEnoughSpace, PlanError, TargetError
from dist_convert.plan.node_local import local_name
from dist_convert.records import View, Window

_MAX_OPEN_FILES = 64

#: Of one system call. For larger ones Linux looks for larger stretches of free memory, which can take seconds.
_WRITE_BYTES = 1 << 20

#: What was written, and the CRC-32 of its bytes; None where there are gaps between them.
Written = tuple[Window, int | None]


class FileWriter:
    """Writes views of the files below one directory; keeps a limited number of them open.

    Not for use by two threads at once.
    """

    def __init__(self, root: Path) -> None:
        self.written_bytes = 0
        self._root = root
        self._open: OrderedDict[str, int] = OrderedDict()

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def write(self, view: View, packed: memoryview) -> Written:
        """Write values that lie row after row in memory to where the view says; returns what to remember of it.

        Raises:
            PlanError: the columns of a row are apart in the file, or there are not as many values as the view has.
            NotEnoughSpace, TargetError: the file system refuses.
        """
        if view.is_transposed:
            raise PlanError("a transposed window is written by its columns", tensor=view.tensor, file=view.file)
        if len(packed) != view.size_bytes:
            raise PlanError(
                "not as many bytes as the window has",
                tensor=view.tensor,
                file=view.file,
                expected=f"{view.size_bytes} bytes",
                found=f"{len(packed)} bytes",
            )
        window = Window.of(view)
        for run in range(window.runs):
            line = packed[run * window.run_bytes : (run + 1) * window.run_bytes]
            self._write_at(view.file, line, window.offset_bytes + run * window.stride_bytes)
        self.written_bytes += len(packed)
        return window, isal_zlib.crc32(packed) if window.runs == 1 else None

    def _write_at(self, file: str, data: memoryview, offset_bytes: int) -> None:
        done = 0
        while done < len(data):
            try:
                count = os.pwrite(self._descriptor(file), data[done : done + _WRITE_BYTES], offset_bytes + done)
                if not count:
                    raise OSError(errno.EIO, "nothing of it was written")
                done += count
            except OSError as error:
                raise target_error(error, file) from error

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
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    is_forbidden = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    what = "make it writable" if is_forbidden else "free space" if is_full else "check the disk or network file system"
    return (NotEnoughSpace if is_full else TargetError)(
        "cannot write the target",
        file=file,
        found=error.strerror or str(error),
        remedy=f"{what}, or choose another target; nothing is left under the final name",
    )
