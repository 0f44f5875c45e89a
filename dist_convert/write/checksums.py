"""CRC-32 checksums of what was written, and of the storages in files of torch, which were filled in place.

A zip record's checksum lies behind its data and in the central directory. Nothing in torch checks them; `unzip -t`
does, and with them tests the file as a whole. Format: PKWARE's APPNOTE.TXT, 4.3.9 (data descriptor) and 4.3.12 (central
directory).
"""

import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from isal import isal_zlib

from dist_convert.errors import CorruptFile
from dist_convert.write.files import Directory, opened, writing

#: (offset, length, CRC-32) of bytes whose checksum was taken when they were written.
KnownRange = tuple[int, int, int]
#: Of files, by name.
KnownRanges = Mapping[str, Sequence[KnownRange]]
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class ZipRecord:
    """Where a record's data begins and ends in a file, and where its header in the central directory begins."""

    start_bytes: int
    end_bytes: int
    header_bytes: int

    def moved(self, distance_bytes: int) -> "ZipRecord":
        """The record of a container that begins so many bytes later."""
        numbers = self.start_bytes, self.end_bytes, self.header_bytes
        return ZipRecord(*(number + distance_bytes for number in numbers))

    @property
    def size_bytes(self) -> int:
        return self.end_bytes - self.start_bytes


#: Signature, and where the checksum lies.
_CENTRAL_HEADER, _DESCRIPTOR = (b"PK\1\2", 16), (b"PK\7\x08", 4)


def checksum_of(descriptor: int, label: str, start: int, end: int, known: Sequence[KnownRange]) -> int:
    """The checksum of a stretch of a file from byte `start` to `end`; only what no known range covers is read.

    Args:
        descriptor, label: of the file, and how messages name it.
        known: in ascending order; a range that overlaps the one before it, or the border of the stretch, is not used.

    Raises:
        CorruptFile: the file ends before the stretch does.
    """
    whole, position = 0, start
    for number in range(bisect_left(known, (start, 0, 0)), bisect_left(known, (end, 0, 0))):
        offset, size_bytes, checksum = known[number]
        if offset >= position and offset + size_bytes <= end:
            whole = _read_checksum(descriptor, label, position, offset, whole)
            whole = isal_zlib.crc32_combine(whole, checksum, size_bytes)
            position = offset + size_bytes
    return _read_checksum(descriptor, label, position, end, whole)


def _read_checksum(descriptor: int, label: str, start: int, end: int, checksum: int) -> int:
    """The checksum of bytes that are read, and of all before them, which is given."""
    while start < end:
        data = os.pread(descriptor, min(end - start, _READ_BYTES), start)
        if not data:
            raise _changed("a file of the target has become shorter", label, f"{end} bytes", f"{start} bytes")
        checksum = isal_zlib.crc32(data, checksum)
        start += len(data)
    return checksum


def write_record_checksums(
    root: Directory, name: str, size_bytes: int, records: Iterable[ZipRecord], known: Sequence[KnownRange]
) -> None:
    """Write the checksum of each record to the two places that hold it; once more, it changes nothing.

    Args:
        root, name, size_bytes: of the file.
        records: those that were filled in place.
        known: see `checksum_of`; what these ranges do not cover is read.

    Raises:
        CorruptFile: it has another size, or the headers beside a record are not there.
    """
    with writing(root / name), opened(root, name, os.O_RDWR) as descriptor:
        if (found_bytes := os.fstat(descriptor).st_size) != size_bytes:
            raise _changed("a file of the target has another size", name, f"{size_bytes} bytes", f"{found_bytes} bytes")
        for record in (one for one in records if one.size_bytes):
            checksum = checksum_of(descriptor, name, record.start_bytes, record.end_bytes, known)
            places = (record.end_bytes, *_DESCRIPTOR), (record.header_bytes, *_CENTRAL_HEADER)
            for place, signature, offset in places:
                if (found := os.pread(descriptor, 4, place)) != signature:
                    raise _changed("no zip header beside a record", name, f"{signature!r} at offset {place}", found)
                os.pwrite(descriptor, checksum.to_bytes(4, "little"), place + offset)


def _changed(what: str, file: str, expected: object, found: object) -> CorruptFile:
    remedy = "something else has written to the target: make sure that nothing does, and convert again"
    return CorruptFile(what, file, expected, found, remedy)
