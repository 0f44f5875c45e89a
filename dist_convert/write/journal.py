"""One rank's diary of finished target bytes, from which a later run goes on.

A line is written when its bytes have been, and costs no fsync: a process that is killed loses nothing that the kernel
has. A machine that loses power does, so every half minute a thread forces the files that were written to the disk and
then the journal, with a mark behind the lines that are safe now. Which lines count after all is `history`'s to say.

A line is a CRC-32 in eight hexadecimal digits, a blank, and JSON: a line that was torn is known by its checksum.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_convert.errors import TargetError
from dist_convert.plan.node_local import local_name
from dist_convert.records import View
from dist_convert.write.file_writer import Written, target_error

#: Of the partial directory, the part that is not the target.
JOURNAL_DIRECTORY = ".journal"
MARK_SECONDS = 30.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_boot() -> tuple[str, str]:
    """This machine's name, and what names the time since it was started; "" where no such thing is known."""
    return socket.gethostname(), _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""


def journal_name(run: int, rank: int) -> str:
    """The file name of one rank's journal."""
    return f"run-{run:05d}-rank-{rank:05d}"


class Journal:
    """Appends to this rank's journal; any thread may.

    Args:
        partial: the directory in which the target is made.
        run: number of this run among those that worked on the target.
        rank: this rank.
    """

    def __init__(self, partial: Path, run: int, rank: int) -> None:
        self._partial = partial
        self._run = run
        self._path = partial / JOURNAL_DIRECTORY / journal_name(run, rank)
        self._lock = threading.Lock()
        self._unsynced: set[str] = set()
        self._failure: TargetError | None = None
        host, boot = this_boot()
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except OSError as error:
            raise target_error(error, str(self._path)) from error
        self._append({"run": run, "rank": rank, "host": host, "boot": boot})

    def wrote(self, written: Sequence[Written]) -> None:
        """Note finished bytes, with their checksums.

        Raises:
            TargetError, NotEnoughSpace: the journal cannot be written, or bytes noted before did not reach the disk.
        """
        if self._failure is not None:
            raise self._failure
        lines = [
            [local_name(window.file), window.offset_bytes, window.run_bytes, window.stride_bytes, window.runs, checksum]
            for window, checksum in written
        ]
        self._append({"wrote": lines}, {local_name(window.file) for window, _ in written})

    def changed(self, kind: str, view: View, values: int) -> None:
        """Note values that a cast changed: `kind` is one of `history.CHANGES`, `view` is what was read.

        Forced to the disk at once: the end must know of them, even if the bytes themselves were marked by another rank.
        """
        self._append({kind: [view.file, view.tensor, view.offset_bytes, view.rows, view.columns, values]})
        with self.syncing(JOURNAL_DIRECTORY):
            os.fdatasync(self._descriptor)

    def lost(self, file: str, *, with_this_run: bool) -> None:
        """Note that bytes of a file are not on the disk: nothing counts of what was noted up to now, on any rank."""
        self._append({"lost": file, "until": self._run if with_this_run else self._run - 1})

    def mark(self) -> None:
        """Force to the disk what has been noted until now, and note that.

        Raises:
            TargetError, NotEnoughSpace: the file system refuses; this is never tried again.
        """
        with self._lock:
            files, self._unsynced = self._unsynced, set()
            safe_bytes = os.fstat(self._descriptor).st_size
        if not files:
            return
        for file in sorted(files):
            with self.syncing(file), _opened(self._partial / file) as descriptor:
                os.fdatasync(descriptor)
        self._append({"mark": safe_bytes})
        with self.syncing(JOURNAL_DIRECTORY):
            os.fdatasync(self._descriptor)

    @contextlib.contextmanager
    def syncing(self, file: str) -> Iterator[None]:
        """Within it a file is forced to the disk; a failure is noted, for this run and those to come.

        Raises:
            TargetError, NotEnoughSpace: for an `OSError` inside.
        """
        try:
            yield
        except OSError as error:
            self._failure = target_error(error, file)
            with contextlib.suppress(TargetError):  # the same disk may refuse this too
                self.lost(file, with_this_run=True)
            raise self._failure from error

    @contextlib.contextmanager
    def marked(self, seconds: float) -> Iterator[None]:
        """Mark every so many seconds until the block ends.

        Raises:
            TargetError, NotEnoughSpace: a mark failed.
        """
        ended = threading.Event()

        def keep_marking() -> None:
            with contextlib.suppress(TargetError):  # the next step raises it
                while not ended.wait(seconds):
                    self.mark()

        marker = threading.Thread(target=keep_marking, daemon=True)
        marker.start()
        try:
            yield
        finally:
            ended.set()
            marker.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Close the file; every line has been written already."""
        os.close(self._descriptor)

    def _append(self, record: Mapping[str, Any], unsynced: set[str] | frozenset[str] = frozenset()) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()
        line = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError as error:
                raise target_error(error, str(self._path)) from error
            self._unsynced |= unsynced


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The sound lines of a journal, each with the position of its end in bytes; torn ones are passed over."""
    end_bytes = 0
    with path.open("rb") as file:
        for line in file:
            end_bytes += len(line)
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text):
                yield end_bytes, json.loads(text)
