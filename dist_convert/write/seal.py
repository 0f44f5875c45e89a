"""Gives every storage of a written `.pt` file its checksum, from those of the ranges that ranks wrote.

torch leaves the checksums of a file that is filled later at 0; with them, `unzip -t` tests the file as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_convert.write.checksums import KnownRange, checksum_of, patch_checksums, record_ranges


def seal(directory: Path, file: str, known: Sequence[KnownRange]) -> None:
    """Patch the checksums of a complete file.

    Args:
        directory: that holds it.
        file: its name in the directory.
        known: checksums of ranges of the file, in ascending order. What they do not cover is read.

    Raises:
        CorruptFile, TargetError: see `checksums`.
    """
    path = directory / file
    ranges = record_ranges(path, file)
    patch_checksums(path, {name: checksum_of(path, at, at + size, known) for name, (at, size) in ranges.items()})
