"""Compares the CRC-32 of stored records with those that their files tell, once all of a record has been read."""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from isal import isal_zlib

from dist_convert.errors import CorruptFile
from dist_convert.records import View

#: For each file, the offset, the size in bytes and the CRC-32 of each record in turn.
Checksums = Mapping[str, Sequence[int]]

#: What is read of a record only to compare it, at most.
_LITTLE_BYTES = 4 << 20


class RecordChecks:
    """The pieces of records that have been read, in whatever order; all threads of a rank share one.

    A record is compared where its pieces fit together without gap or overlap.
    """

    def __init__(self, checksums: Checksums = MappingProxyType({})) -> None:
        self._checksums = checksums
        self._lock = threading.Lock()
        #: Of a file, its records as (offset, size, CRC-32), by offset.
        self._records: dict[str, list[tuple[int, int, int]]] = {}
        #: Of stretches that were read: size and CRC-32 by where they begin, and where they begin by where they end.
        self._stretches: dict[tuple[str, int], tuple[int, int]] = {}
        self._starts: dict[tuple[str, int], int] = {}
        #: One of the views of a record that is not whole yet, by where it begins.
        self._views: dict[tuple[str, int], View] = {}

    def add(self, piece: memoryview, view: View, offset_bytes: int) -> int | None:
        """Add bytes of a view's file that have been read at an offset; their CRC-32, if it was worked out.

        Raises:
            CorruptFile: with them a record is whole, and is not what was saved.
        """
        file = view.file
        if file not in self._checksums:
            return None
        start, size_bytes, expected = self._record_at(file, offset_bytes)
        end_bytes = offset_bytes + len(piece)
        if end_bytes > start + size_bytes:
            return None
        checksum = of_piece = isal_zlib.crc32(piece)
        with self._lock:
            if end_bytes < start + size_bytes and (file, end_bytes) in self._stretches:
                more_bytes, more = self._stretches.pop((file, end_bytes))
                checksum = isal_zlib.crc32_combine(checksum, more, more_bytes)
                end_bytes += more_bytes
            first = self._starts.pop((file, offset_bytes), -1) if offset_bytes > start else -1
            # What was read twice in pieces of two sizes is remembered in one of them.
            if self._stretches.get((file, first), (0, 0))[0] == offset_bytes - first:
                _, before = self._stretches.pop((file, first))
                checksum = isal_zlib.crc32_combine(before, checksum, end_bytes - offset_bytes)
                offset_bytes = first
            is_whole = (offset_bytes, end_bytes) == (start, start + size_bytes)
            if is_whole:
                self._starts.pop((file, end_bytes), None)
                self._views.pop((file, start), None)
            else:
                self._stretches[file, offset_bytes] = end_bytes - offset_bytes, checksum
                self._starts[file, end_bytes] = offset_bytes
                self._views[file, start] = view
        if is_whole and checksum != expected:
            raise CorruptFile(
                "the bytes of a tensor are not those that were saved",
                file,
                tensor=view.tensor,
                expected=f"CRC-32 {expected:08x} of {size_bytes} bytes at offset {start}, as the file says",
                found=f"{checksum:08x}",
            )
        return of_piece

    def little_missing(self) -> Iterator[tuple[View, int, int]]:
        """What to read so that records are whole which lack no more than a block and half of them.

        That is the padding of a vocabulary, which no target has.

        Returns:
            A view of the record, and offset and size in bytes of a gap in it.
        """
        read: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for (file, offset_bytes), (size_bytes, _) in sorted(self._stretches.items()):
            start, *_ = self._record_at(file, offset_bytes)
            read.setdefault((file, start), []).append((offset_bytes, offset_bytes + size_bytes))
        for (file, start), stretches in read.items():
            _, size_bytes, _ = self._record_at(file, start)
            at_bytes, gaps = start, list[tuple[int, int]]()
            for first, end_bytes in [*stretches, (start + size_bytes, start + size_bytes)]:
                if first > at_bytes:
                    gaps.append((at_bytes, first - at_bytes))
                at_bytes = max(at_bytes, end_bytes)
            is_little = sum(gap_bytes for _, gap_bytes in gaps) <= min(_LITTLE_BYTES, size_bytes // 2)
            if is_little and (view := self._views.get((file, start))):
                yield from ((view, *gap) for gap in gaps)

    def _record_at(self, file: str, offset_bytes: int) -> tuple[int, int, int]:
        """Offset, size and CRC-32 of the record that a byte may lie in."""
        if file not in self._records:
            numbers = self._checksums[file]
            self._records[file] = sorted(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
        records = self._records[file]
        number = bisect_right(records, offset_bytes, key=lambda record: record[0]) - 1
        return records[number] if number >= 0 else (0, 0, 0)
