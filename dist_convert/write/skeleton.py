"""A target file in its final size before any data, and its space on the disk."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from dist_convert.errors import TargetError
from dist_convert.write.file_writer import target_error

_REFUSALS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def make_file(path: Path, label: str, pieces: Iterable[tuple[int, bytes]], size_bytes: int) -> None:
    """Write all of a file that is no tensor's values, and give it its size; values that are there already stay.

    Args:
        path: of the file; directories above it are made.
        label: how messages name it.
        pieces: offset in bytes and content.
        size_bytes: of the whole file.

    Raises:
        NotEnoughSpace, TargetError: the file system refuses, or the file is there and longer.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)  # NFS reads no page for it
        try:
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
        finally:
            os.close(descriptor)
    except OSError as error:
        raise target_error(error, label) from error


def reserve_file(path: Path, label: str) -> bool:
    """Have blocks of the disk behind all of a file, so that no write can find it full; values that are there stay.

    By fallocate(2) itself: posix_fallocate falls back to writing, which may fall on what another rank has written.

    Args:
        path: of a file in its final size.
        label: how messages name it.

    Returns:
        Whether the file system can promise that. Where it cannot, its free space has been compared before.

    Raises:
        NotEnoughSpace, TargetError: the file system refuses.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            size_bytes = os.fstat(descriptor).st_size
            return not size_bytes or _fallocate(descriptor, size_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise target_error(error, label) from error


def _fallocate(descriptor: int, size_bytes: int) -> bool:
    """Whether the file system has reserved the space."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None:
        return False
    off_t = ctypes.c_int64 if ctypes.sizeof(ctypes.c_long) == 8 else ctypes.c_long
    call.argtypes = (ctypes.c_int, ctypes.c_int, off_t, off_t)
    while call(descriptor, 0, 0, size_bytes):
        number = ctypes.get_errno()
        if number in _REFUSALS:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
