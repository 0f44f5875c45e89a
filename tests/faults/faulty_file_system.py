"""A file system that shows a directory and fails where it is told to: `python -m ... DIRECTORY MOUNT_POINT RULES`.

RULES is a JSON file, read anew at every call: a list of objects with

    call     of the system: open, read, write, fsync or rename
    file     what the path contains, or of a rename one of both
    at       a byte; reads and writes that touch it are meant
    answer   an errno's name; "half" of the bytes; the bytes "up to" that place; "hang" for long; or a change to a
             file, then the usual answer: "replace", "rewrite", "cut", or "fill" the disk with a new one
    changed  the file that is changed, below DIRECTORY; without it the one that is read

Reads and writes reach it as they are made, past the kernel's cache. It knows no fallocate(2), as some file systems.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mfusepy import FUSE, FuseOSError, Operations

#: A call without an answer cannot be killed, and no process that waits for it can end.
HANG_SECONDS = 10.0
CHANGES = ("replace", "rewrite", "cut", "fill")


def change(path: Path, how: str) -> None:
    """Give a file other bytes: under its name, in its place, or fewer of them. A file that is new is let be.

    Or make a file of all the space that its disk has left.
    """
    if how == "fill":
        with contextlib.suppress(OSError), path.open("xb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        return
    if time.time() - path.stat().st_mtime < 60.0:  # it has been changed; tests date their sources back by an hour
        return
    other = bytes(255 - byte for byte in path.read_bytes())
    if how == "cut":
        os.truncate(path, len(other) // 4)
    elif how == "rewrite":
        with path.open("r+b") as file:
            file.write(other)
    else:
        path.with_suffix(".new").write_bytes(other)
        path.with_suffix(".new").rename(path)


class FaultyFileSystem(Operations):  # type: ignore[misc]
    """Passes calls on to a directory, but for those that a rule names. Files' handles are their descriptors."""

    use_ns = True

    def __init__(self, root: str, rules: Path) -> None:
        self._root = root
        self._rules = rules

    def _path(self, path: str) -> str:
        return self._root + path

    def _answer(self, call: str, path: str, offset: int = 0, size: int = 1) -> tuple[str, int]:
        """What a rule says of a call, and at which byte; "" where none does. Makes the change that it asks for.

        Raises:
            FuseOSError: where that is an error.
        """
        for rule in json.loads(self._rules.read_text()):
            at = rule.get("at", 0)
            if rule["call"] == call and rule["file"] in path and offset <= at < offset + size:
                if rule["answer"].isupper():
                    raise FuseOSError(getattr(errno, rule["answer"]))
                if rule["answer"] in CHANGES:
                    change(Path(self._path(rule.get("changed", path))), rule["answer"])
                return rule["answer"], at
        return "", 0

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._path(path)) if fh is None else os.fstat(fh)
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        times = {f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "amc"}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._path(path))]

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._path(path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_") and name != "f_fsid"}

    def open(self, path: str, flags: int) -> int:
        self._answer("open", path)
        return os.open(self._path(path), flags & ~os.O_APPEND)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        self._answer("open", path)
        return os.open(self._path(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        answer, at = self._answer("read", path, offset, size)
        if answer == "hang":
            time.sleep(HANG_SECONDS)
        if answer == "half":
            size = (size + 1) // 2
        if answer == "up to":
            size = at - offset
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        answer, _ = self._answer("write", path, offset, len(data))
        return os.pwrite(fh, data[: (len(data) + 1) // 2] if answer == "half" else data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._path(path) if fh is None else fh, length)

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        self._answer("fsync", path)
        os.fsync(fh)

    def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
        self._answer("fsync", path)

    def rename(self, old: str, new: str) -> None:
        self._answer("rename", f"{old} {new}")
        os.rename(self._path(old), self._path(new))

    def unlink(self, path: str) -> None:
        os.unlink(self._path(path))

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._path(path), mode)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._path(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._path(path))

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(self._path(path), ns=times)


if __name__ == "__main__":
    root, mount_point, rules = sys.argv[1:]
    FUSE(
        FaultyFileSystem(root, Path(rules)), mount_point, foreground=True, direct_io=True, attr_timeout=0,
        entry_timeout=0, default_permissions=True,
    )  # fmt: skip
