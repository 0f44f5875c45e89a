"""Whether what a conversion reads should leave the page cache behind it, for the files of other jobs on the node."""

from __future__ import annotations

from pathlib import Path

_MEMORY = Path("/proc/meminfo")


def pushes_others_out(streamed_bytes: int) -> bool:
    """Whether so many bytes, read and written, need more pages than are free, so that other files lose theirs.

    False where the system does not say what is free. Letting pages go takes a third of the time that reading them from
    the cache takes, so it is done only where it saves somebody theirs.
    """
    try:
        free_bytes = unused_bytes(_MEMORY.read_text(encoding="ascii"))
    except OSError:
        return False
    return free_bytes is not None and streamed_bytes > free_bytes


def unused_bytes(meminfo: str) -> int | None:
    """The memory that nobody uses, not for a page cache either; None where the text does not have it.

    Args:
        meminfo: lines of names and kibibytes
            (https://www.kernel.org/doc/html/latest/filesystems/proc.html, "meminfo").
    """
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemFree":
            return int(value.split()[0]) * 1024
    return None
