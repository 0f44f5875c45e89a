"""The kind of file system that holds a path, and the kinds on which two machines must not write one file at a time."""

from __future__ import annotations

import os
from pathlib import Path

from dist_convert.write.commit import existing_parent

#: Clients of these keep pages of a file for themselves: where two of them write parts of one page at the same time, one
#: may send the other's part as it was before (docs/clusters.md, "Targets on NFS"). Names as in the kernel's mountinfo.
ONE_WRITER = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "afs"})

_MOUNTS = Path("/proc/self/mountinfo")


def file_system_type(path: Path) -> str:
    """The type of the file system that holds a path, or the nearest thing above it; "" where nobody says."""
    holder = path if os.path.lexists(path) else existing_parent(path)
    try:
        device = os.stat(holder).st_dev
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
    return types_by_device(mounts).get(f"{os.major(device)}:{os.minor(device)}", "")


def types_by_device(mountinfo: str) -> dict[str, str]:
    """The types of mounted file systems by their device, `major:minor`, which all mounts of one file system share.

    Args:
        mountinfo: number, parent, device, root, mount point and options of each mount, any number of optional fields, a
            hyphen, type, source and more options; blanks inside of a field are octal
            (https://www.kernel.org/doc/html/latest/filesystems/proc.html, "/proc/<pid>/mountinfo").
    """
    lines = [line.partition(" - ") for line in mountinfo.splitlines()]
    return {mount.split()[2]: kind.split()[0] for mount, _, kind in lines if kind}
