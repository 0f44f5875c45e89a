"""Tells whether files of one name on different machines are the same, without reading them whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dist_convert.read.source_file import reading

_PIECES = 16
_PIECE_BYTES = 4096


def stamp(path: Path) -> tuple[int, int, int]:
    """Size in bytes, inode and time of the last change: equal wherever one shared file is looked at."""
    found = path.stat()
    return found.st_size, found.st_ino, found.st_mtime_ns


def sample_digest(path: Path, file: str) -> str:
    """SHA-256 of evenly spaced pieces, the first and the last bytes among them.

    Weights of two trainings or of two iterations differ nearly everywhere, and so in any sample.

    Args:
        path: the file on this machine.
        file: how messages name it.

    Raises:
        SourceError: it cannot be read.
    """
    digest = hashlib.sha256()
    with reading(file), path.open("rb") as opened:
        last_bytes = max(0, path.stat().st_size - _PIECE_BYTES)
        for number in range(_PIECES):
            opened.seek(last_bytes * number // (_PIECES - 1))
            digest.update(opened.read(_PIECE_BYTES))
    return digest.hexdigest()
