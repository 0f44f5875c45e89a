"""Before a run of `interrupted_runs`: a stand-in for NFS, which needs servers and clients with kernels of their own.

It is this machine's file system under another name: the conversion is told `nfs4`. Every rank prints which target files
it writes tensors to, and how it has opened them.
"""

from __future__ import annotations

import fcntl
import os
import sys
from typing import Any

import dist_convert.write.task

KINDS = {os.O_RDONLY: "to read", os.O_WRONLY: "to write", os.O_RDWR: "to read and write"}


def prepare() -> None:
    """From now on, every target lies on NFS."""
    dist_convert.write.task.file_system_type = lambda path: "nfs4"
    note_writes()


def note_writes() -> None:
    """From now on, print a line for every file that tensors are written to."""
    noted: set[str] = set()
    pwrite = os.pwrite

    def noting(descriptor: int, data: Any, offset_bytes: int) -> int:
        if isinstance(data, memoryview):  # all else is written from bytes
            opened = KINDS[fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE]
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path not in noted:
                print(f"{path} is open {opened}", file=sys.stderr)
            noted.add(path)
        return pwrite(descriptor, data, offset_bytes)

    os.pwrite = noting
