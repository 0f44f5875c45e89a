"""fsync of a file or directory by its path."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file or a directory to the disk.

    Raises:
        OSError: it may not be there; trying again would say that it is.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
