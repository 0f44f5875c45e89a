"""`interrupted_runs` on a stand-in for NFS, which needs servers and clients with kernels of their own.

It is this machine's file system under another name: the conversion is told `nfs4`. Every rank prints which target files
it writes tensors to, and how it has opened them.
"""

from __future__ import annotations

import fcntl
import os
import sys
from typing import Any

from tests.distributed.programs import interrupted_runs  # first: it sets the sizes of blocks

import dist_convert.write.task  # isort: skip

KINDS = {os.O_RDONLY: "to read", os.O_WRONLY: "to write", os.O_RDWR: "to read and write"}


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


if __name__ == "__main__":
    dist_convert.write.task.file_system_type = lambda path: "nfs4"
    note_writes()
    interrupted_runs.main()
