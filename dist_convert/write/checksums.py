"""CRC-32 checksums of what was written, and of a `.pt` file's storages, which was filled in place.

torch stores a zip record's checksum after its data and in the central directory, and leaves both 0 where it skipped
the data. Nothing in torch checks them; `unzip -t` does, and with them tests the file as a whole. Format: PKWARE's
APPNOTE.TXT, 4.3.7 (local header), 4.3.9 (data descriptor) and 4.3.12 (central directory).
"""

import os
import zipfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

from isal import isal_zlib

from dist_convert.errors import CorruptFile
from dist_convert.read.source import opened_source
from dist_convert.read.torch_file import Container, data_offset_bytes, open_container
from dist_convert.write.files import opened, writing

#: (offset, length, CRC-32) of bytes whose checksum was taken when they were written.
KnownRange = tuple[int, int, int]
_READ_BYTES = 8 << 20

_CENTRAL_HEADER_BYTES, _CENTRAL_CRC = 46, 16
_LOCAL_FLAGS, _LOCAL_CRC = 6, 14
_HAS_DESCRIPTOR = 1 << 3
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"

_CHANGED = "something else has written to the target: let nothing do that, and convert again"


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
            raise CorruptFile(
                "a file of the target has become shorter", file=label, found=f"{start} bytes", remedy=_CHANGED
            )
        checksum = isal_zlib.crc32(data, checksum)
        start += len(data)
    return checksum


def write_record_checksums(root: Path, name: str, known: Sequence[KnownRange]) -> None:
    """Write the storages' checksums to the two places of a `.pt` file that hold them; once more, it changes nothing.

    What the known ranges, in ascending order, do not cover is read.

    Raises:
        CorruptFile: it is not a container that torch wrote.
    """
    with opened_source(root / name, name) as file:
        container = open_container(file, name)
        storages = [record for record in container.records if record.startswith("data/")]
        starts = {storage: data_offset_bytes(container, storage) for storage in storages}
        central = dict(_central_headers(container))
    with writing(root / name), opened(root, name, os.O_RDWR) as descriptor:
        for storage, start in starts.items():
            record = container.records[storage]
            end = start + record.size_bytes
            value = checksum_of(descriptor, name, start, end, known).to_bytes(4, "little")
            place = _local_place(descriptor, record.header_offset_bytes, end, f"{name}: {storage}")
            os.pwrite(descriptor, value, place)
            os.pwrite(descriptor, value, central[storage] + _CENTRAL_CRC)


def _central_headers(container: Container) -> Iterator[tuple[str, int]]:
    """Record name, and where its header in the central directory begins."""
    with zipfile.ZipFile(container.file) as archive:
        offset_bytes = archive.start_dir
        for entry in archive.infolist():
            name = entry.filename.partition("/")[2]
            yield name, offset_bytes
            name_bytes = len(container.records[name].path)
            offset_bytes += _CENTRAL_HEADER_BYTES + name_bytes + len(entry.extra) + len(entry.comment)


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
        raise CorruptFile(
            "no data descriptor behind a record",
            file=label,
            expected=_DESCRIPTOR_SIGNATURE,
            found=found,
            remedy=_CHANGED,
        )
    return end_bytes + len(_DESCRIPTOR_SIGNATURE)
