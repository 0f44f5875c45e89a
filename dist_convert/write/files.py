"""Files of a target: made in their final size, written at positions, replaced as a whole, forced to the disk."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from isal import isal_zlib

from dist_convert.errors import NotEnoughSpace, PlanError, TargetError
from dist_convert.records import View, Window, local_name


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of a file or directory, for as long as the block lasts."""
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Force a file or a directory to the disk.

    Raises:
        OSError: it may not be there; trying again would say that it is.
    """
    with opened(path) as descriptor:
        os.fsync(descriptor)


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


@contextmanager
def writing(file: str | Path) -> Iterator[None]:
    """Within it a file or directory of the target is made, written or renamed."""
    try:
        yield
    except OSError as error:
        raise target_error(error, str(file)) from error


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
        self._open: dict[str, int] = {}  # the one that was used last is the last

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def write(self, view: View, packed: memoryview) -> Written:
        """Write values that lie row after row in memory to where the view says; returns what to remember of it.

        Raises:
            PlanError: the columns of a row are apart in the file, or there are not as many values as the view has.
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
        with writing(file):
            while done < len(data):
                count = os.pwrite(self._descriptor(file), data[done : done + _WRITE_BYTES], offset_bytes + done)
                if not count:
                    raise OSError(errno.EIO, "nothing of it was written")
                done += count

    def _descriptor(self, file: str) -> int:
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            descriptor = os.open(self._root / local_name(file), os.O_WRONLY)
            if len(self._open) >= _MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[file] = descriptor
        return descriptor


def make_file(path: Path, label: str, pieces: Iterable[tuple[int, bytes]], size_bytes: int) -> None:
    """Write all of a file that is no tensor's values, and give it its size; values that are there already stay.

    Args:
        path, label: of the file, and how messages name it; directories above it are made.
        pieces: offset in bytes and content.
        size_bytes: of the whole file.

    Raises:
        TargetError: the file is there and longer.
    """
    with writing(label):
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:  # NFS reads no page for it
            found_bytes = os.fstat(descriptor).st_size
            if found_bytes > size_bytes:
                raise TargetError(
                    "an unfinished file is longer than it can be",
                    file=label,
                    expected=f"at most {size_bytes} bytes",
                    found=f"{found_bytes} bytes",
                    remedy="it is not cut; remove the partial directory, or start anew with --overwrite",
                )
            if found_bytes < size_bytes:
                os.ftruncate(descriptor, size_bytes)
            for offset_bytes, piece in pieces:
                if os.pwrite(descriptor, piece, offset_bytes) != len(piece):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def reserve_file(path: Path, label: str) -> bool:
    """Have blocks of the disk behind all of a file, so that no write can find it full; values that are there stay.

    By fallocate(2) itself: posix_fallocate falls back to writing, which may fall on what another rank has written.

    Returns:
        Whether the file system can promise that. Where it cannot, its free space has been compared before.
    """
    with writing(label), opened(path, os.O_WRONLY) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
        if not size_bytes:
            return True
        if call is None:
            return False
        off_t = ctypes.c_int64 if ctypes.sizeof(ctypes.c_long) == 8 else ctypes.c_long
        call.argtypes = (ctypes.c_int, ctypes.c_int, off_t, off_t)
        while call(descriptor, 0, 0, size_bytes):
            number = ctypes.get_errno()
            if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return False
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
    return True


#: In the root of a Megatron checkpoint: which of its iterations is the newest.
TRACKER_FILE = "latest_checkpointed_iteration.txt"


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old one or the new one, and nothing between."""
    fresh = path.with_name(path.name + ".new")
    with writing(path):
        fresh.write_text(text, encoding="utf-8")
        sync(fresh)
        fresh.replace(path)
        sync(path.absolute().parent)
