"""Small and large file systems in memory, where this user may mount them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def mounted(point: Path, options: str) -> bool:
    """Make a directory and mount an empty file system there; False where that is not allowed (it needs root)."""
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "dist-convert-test", str(point)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def unmount(point: Path) -> None:
    subprocess.run(["umount", "--lazy", str(point)], check=True)
