"""Gives every storage of a written `.pt` file its checksum, from those of the ranges that ranks wrote.

torch leaves the checksums of a file that is filled later at 0; with them, `unzip -t` tests the file as a whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

from dist_convert.write.checksums import combine, patch_checksums, record_ranges

#: (offset, length, CRC-32) of one contiguous write.
WrittenRange = tuple[int, int, int]
_READ_BYTES = 8 << 20


def seal(directory: Path, file: str, written: Iterable[WrittenRange]) -> None:
    """Patch the checksums of a complete file.

    Args:
        directory: that holds it.
        file: its name in the directory.
        written: ranges of the file, in any order. A storage that they do not cover without gaps is read once.

    Raises:
        CorruptFile, TargetError: see `checksums`.
    """
    path = directory / file
    ranges = sorted(written)
    checksums = {}
    position = 0
    for name, (start, size) in sorted(record_ranges(path, file).items(), key=lambda item: item[1]):
        parts, covered = [], start
        while position < len(ranges) and ranges[position][0] < start + size:
            offset, length, checksum = ranges[position]
            if offset == covered:
                parts.append((checksum, length))
                covered += length
            position += 1
        checksums[name] = combine(parts) if covered == start + size else _read_checksum(path, start, size)
    patch_checksums(path, checksums)


def _read_checksum(path: Path, start: int, size: int) -> int:
    checksum = 0
    with path.open("rb") as file:
        file.seek(start)
        while size > 0:
            data = file.read(min(size, _READ_BYTES))
            checksum = zlib.crc32(data, checksum)
            size -= len(data)
    return checksum
