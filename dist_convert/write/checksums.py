"""CRC-32 checksums of a `.pt` file's storages, for a file that was filled in place.

torch stores a zip record's checksum after its data and in the central directory, and leaves both 0 where it skipped
the data. Nothing in torch checks them; `unzip -t` does, and with them tests the file as a whole. Format: PKWARE's
APPNOTE.TXT, 4.3.7 (local header), 4.3.9 (data descriptor) and 4.3.12 (central directory).
"""

from __future__ import annotations

import os
import struct
import zipfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from isal import isal_zlib

from dist_convert.errors import CorruptFile, PlanError
from dist_convert.read.torch_file import data_offsets_bytes, open_container
from dist_convert.write.files import target_error

#: (offset, length, CRC-32) of bytes whose checksum was taken when they were written.
KnownRange = tuple[int, int, int]
_READ_BYTES = 8 << 20

_CENTRAL_HEADER_BYTES, _CENTRAL_CRC = 46, 16
_CENTRAL_LENGTHS = struct.Struct("<3H")  # of name, extra field and comment
_CENTRAL_LENGTHS_AT = 28
_LOCAL_FLAGS, _LOCAL_CRC = 6, 14
_HAS_DESCRIPTOR = 1 << 3
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"


def combine(parts: Iterable[tuple[int, int]]) -> int:
    """The checksum of consecutive byte ranges from those of the ranges, without their bytes.

    Args:
        parts: checksum and length in bytes of each range, in the order of the file.
    """
    whole = 0
    for checksum, size_bytes in parts:
        whole = isal_zlib.crc32_combine(whole, checksum, size_bytes)
    return whole


def checksum_of(path: Path, start: int, end: int, known: Sequence[KnownRange]) -> int:
    """The checksum of a stretch of a file, of which only what no known range covers is read.

    Args:
        path: the file on this machine.
        start, end: of the stretch, in bytes.
        known: in ascending order; a range that overlaps the one before it, or the border of the stretch, is not used.

    Raises:
        CorruptFile: the file ends before the stretch does.
        OSError: it cannot be read.
    """
    parts = []
    position = start
    with path.open("rb") as file:
        for offset, size_bytes, checksum in known[bisect_left(known, (start, 0, 0)) :]:
            if offset >= end:
                break
            if offset < position or offset + size_bytes > end:
                continue
            if position < offset:
                parts.append(_read_checksum(file, position, offset))
            parts.append((checksum, size_bytes))
            position = offset + size_bytes
        if position < end:
            parts.append(_read_checksum(file, position, end))
    return combine(parts)


def _read_checksum(file: BinaryIO, start: int, end: int) -> tuple[int, int]:
    """The checksum of bytes that are read, and how many they are."""
    checksum, position = 0, start
    file.seek(start)
    while position < end:
        data = file.read(min(end - position, _READ_BYTES))
        if not data:
            raise CorruptFile("a file of the target has become shorter", file=file.name, found=f"{position} bytes")
        checksum = isal_zlib.crc32(data, checksum)
        position += len(data)
    return checksum, end - start


def record_ranges(path: Path, label: str) -> dict[str, tuple[int, int]]:
    """Where the storages lie: record name (`data/0`) -> (offset from the start of the file, size), in bytes.

    Args:
        path: the file on this machine.
        label: how messages name it.

    Raises:
        CorruptFile: see `read.torch_file`.
    """
    container = open_container(path, label)
    names = [name for name in container.records if name.startswith("data/")]
    offsets = data_offsets_bytes(container, names)
    return {name: (offsets[name], container.records[name].size_bytes) for name in names}


def patch_checksums(path: Path, checksums: Mapping[str, int]) -> None:
    """Write checksums of storages to the two places that hold them; doing it again changes nothing.

    Args:
        path: a complete `.pt` file.
        checksums: record name (`data/0`) -> CRC-32 of its bytes. Records that it does not name are left alone.

    Raises:
        PlanError: the file has no record of a name.
        CorruptFile: it is not a container that torch wrote.
        TargetError, NotEnoughSpace: the file system refuses.
    """
    label = str(path)
    ranges = record_ranges(path, label)
    unknown = sorted(checksums.keys() - ranges.keys())
    if unknown:
        raise PlanError("a checksum of a record that the file lacks", file=label, found=unknown[0])
    headers = open_container(path, label).records
    try:
        with path.open("r+b") as file:
            central = dict(_central_headers(file.fileno(), _directory_offset_bytes(path)))
            for name, checksum in checksums.items():
                header, end = headers[name].header_offset_bytes, sum(ranges[name])
                value = checksum.to_bytes(4, "little")
                os.pwrite(file.fileno(), value, _local_place(file.fileno(), header, end, f"{label}: {name}"))
                os.pwrite(file.fileno(), value, central[name] + _CENTRAL_CRC)
    except OSError as error:
        raise target_error(error, label) from error


def _directory_offset_bytes(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        return archive.start_dir


def _central_headers(descriptor: int, offset_bytes: int) -> Iterator[tuple[str, int]]:
    """Record name, without the archive's folder, and where its header in the central directory begins."""
    while True:
        header = os.pread(descriptor, _CENTRAL_HEADER_BYTES, offset_bytes)
        if header[:4] != b"PK\x01\x02":  # what follows the last one has another signature
            return
        name_bytes, extra_bytes, comment_bytes = _CENTRAL_LENGTHS.unpack_from(header, _CENTRAL_LENGTHS_AT)
        name = os.pread(descriptor, name_bytes, offset_bytes + _CENTRAL_HEADER_BYTES).decode()
        yield name.partition("/")[2], offset_bytes
        offset_bytes += _CENTRAL_HEADER_BYTES + name_bytes + extra_bytes + comment_bytes


def _local_place(descriptor: int, header_offset_bytes: int, end_bytes: int, label: str) -> int:
    """Where the checksum beside the data is: behind it if the header says so, else in the header.

    Raises:
        CorruptFile: the descriptor behind the data lacks the signature that torch gives it.
    """
    flags = int.from_bytes(os.pread(descriptor, 2, header_offset_bytes + _LOCAL_FLAGS), "little")
    if not flags & _HAS_DESCRIPTOR:
        return header_offset_bytes + _LOCAL_CRC
    found = os.pread(descriptor, 4, end_bytes)
    if found != _DESCRIPTOR_SIGNATURE:
        raise CorruptFile("no data descriptor behind a record", file=label, expected=_DESCRIPTOR_SIGNATURE, found=found)
    return end_bytes + len(_DESCRIPTOR_SIGNATURE)


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
