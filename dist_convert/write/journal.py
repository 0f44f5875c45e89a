"""One rank's diary of finished target bytes, and what the diaries of earlier runs prove.

A line is written when its bytes have been, and costs no fsync: a process that is killed loses nothing that the kernel
has. A machine that loses power does, so every half minute a thread forces the files that were written to the disk and
then the journal, with a mark behind the lines that are safe now. So a line counts if the machine that wrote it has not
been started anew since, or if a mark stands behind it. Whether it has is known only where a rank of this run is on
that machine; of any other machine, what is marked counts.

A line is a CRC-32 in eight hexadecimal digits, a blank, and JSON: a line that was torn is known by its checksum. One
whose checksum is right and that says something else than a journal does is no accident, and nothing is believed then.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isal import isal_zlib

from dist_convert.errors import TargetError
from dist_convert.ranks.timeout import wait_for_end
from dist_convert.records import JsonObject, View, Window, local_name
from dist_convert.write.files import Directory, Root, Written, names_in, open_below, opened, target_error, writing

#: Of the partial directory, the part that is not the target.
JOURNAL_DIRECTORY = ".journal"
_MARK_SECONDS = 30.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_JOURNAL = re.compile(r"run-[0-9]{5,9}-rank-[0-9]{5,9}")
#: Of one journal: the longest have a window for each block of 4 MiB, and a hundred bytes for each window.
_MOST_RUNS, _MOST_BYTES = 999_999_999, 256 << 20
#: Windows that any target may have: they take 100 MB of memory.
FEW_WINDOWS = 200_000


def this_boot() -> tuple[str, str]:
    """This machine's name, and what names the time since it was started; "" where no such thing is known."""
    return socket.gethostname(), _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""


class Journal:
    """Appends to the journal of this rank, and of this run among those that worked on the target; any thread may."""

    def __init__(self, partial: Directory, run: int, rank: int) -> None:
        self._partial = partial
        self._run = run
        name = f"{JOURNAL_DIRECTORY}/run-{run:05d}-rank-{rank:05d}"
        self._path = partial / name
        self._is_torn = False
        self._lock = threading.Lock()
        self._unsynced = set[str]()
        self._failure: TargetError | None = None
        host, boot = this_boot()
        with writing(self._path):
            self._descriptor = open_below(partial, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        self._append({"run": run, "rank": rank, "host": host, "boot": boot})

    def wrote(self, written: Sequence[Written]) -> None:
        """Note finished bytes, with their checksums.

        Raises:
            TargetError, NotEnoughSpace: the journal cannot be written, or bytes noted before did not reach the disk.
        """
        if self._failure is not None:
            raise self._failure
        lines = [[local_name(file), *rest] for file, *rest in map(fields, written)]
        self._append({"wrote": lines}, {file for file, *_ in lines})

    def changed(self, kind: str, view: View, values: int) -> None:
        """Note values that a cast changed: `kind` is one of `CHANGES`, `view` is what was read.

        Forced to the disk at once: the end must know of them, even if the bytes themselves were marked by another rank.
        """
        self._append(
            {kind: [view.file, view.tensor, view.offset_bytes, view.rows, view.columns, values]}, is_forced=True
        )

    def lost(self, file: str, *, with_this_run: bool) -> None:
        """Note that bytes of a file are not on the disk: nothing counts of what was noted up to now, on any rank."""
        self._append({"lost": file, "until": self._run if with_this_run else self._run - 1})

    def mark(self) -> None:
        """Force to the disk what has been noted until now, and note that."""
        with self._lock:
            files, self._unsynced = self._unsynced, set()
            safe_bytes = os.fstat(self._descriptor).st_size
        if not files:
            return
        self.sync(sorted(files))
        self._append({"mark": safe_bytes}, is_forced=True)

    def sync(self, files: Iterable[str]) -> None:
        """Force files of the target to the disk."""
        for file in files:
            with self.syncing(file), opened(self._partial, file) as descriptor:
                os.fdatasync(descriptor)

    @contextlib.contextmanager
    def syncing(self, file: str) -> Iterator[None]:
        """Within it a file is forced to the disk; a failure is noted, for this run and those to come."""
        try:
            yield
        except OSError as error:
            self._failure = target_error(error, self._partial / file)
            with contextlib.suppress(TargetError):  # the same disk may refuse this too
                self.lost(file, with_this_run=True)
            raise self._failure from error

    @contextlib.contextmanager
    def marked(self, seconds: float = _MARK_SECONDS) -> Iterator[None]:
        """Mark every so many seconds until the block ends."""
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
            wait_for_end(lambda: not marker.is_alive())
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Every line has been written already."""
        os.close(self._descriptor)

    def _append(self, record: JsonObject, unsynced: Iterable[str] = (), *, is_forced: bool = False) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()
        with self._lock, writing(self._path):
            # Behind what a full disk has cut off, a line of its own.
            line = memoryview(b"%s%08x %s\n" % (b"\n" if self._is_torn else b"", zlib.crc32(text), text))
            self._is_torn = True
            while line:
                line = line[os.write(self._descriptor, line) :]
            self._is_torn = False
            self._unsynced.update(unsynced)
        if is_forced:
            with self.syncing(JOURNAL_DIRECTORY):
                os.fdatasync(self._descriptor)


#: A line has the windows of one step, or one fact; of a longer one each part is a torn line.
_MOST_LINE_BYTES = 16 << 20


def read_lines(partial: Root, name: str) -> Iterator[tuple[int, Any]]:
    """A journal's whole lines, each with the position of its end in bytes; a ValueError for one that is no JSON."""
    end_bytes = 0
    with os.fdopen(open_below(partial, f"{JOURNAL_DIRECTORY}/{name}"), "rb") as file:
        while line := file.readline(_MOST_LINE_BYTES):
            end_bytes += len(line)
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text):
                try:
                    yield end_bytes, json.loads(text)
                except RecursionError as error:
                    raise ValueError(str(error)) from error


def _is_record(record: Any) -> bool:
    """Whether a whole line says something that a journal says."""
    match record:
        case {"wrote": [*windows], **rest}:
            return not rest and all(_is_written(window) for window in windows)
        case {"run": int(), "rank": int(), "host": str(), "boot": str(), **rest}:
            return not rest
        case {"mark": int(), **rest} | {"lost": str(), "until": int(), **rest}:
            return not rest
        case {"overflowed": [str(), str(), int(), int(), int(), int()], **rest}:
            return not rest
        case {"rounded_norms": [str(), str(), int(), int(), int(), int()], **rest}:
            return not rest
    return False


def _is_written(values: Any) -> bool:
    match values:
        case [str(), int(offset), int(run), int(stride), int(runs), int() | None as checksum]:
            is_window = min(offset, run, stride) >= 0 and runs > 0 and max(offset, run, stride, runs) <= sys.maxsize
            return is_window and 0 <= (checksum or 0) < 1 << 32
    return False


CHANGES = ("overflowed", "rounded_norms")


@dataclass(frozen=True)
class ResumeState:
    """What earlier runs did.

    Attributes:
        written: finished bytes; what follows each other within one journal is joined.
        changed: for each of `CHANGES`, how many values of a tensor a cast changed.
    """

    written: tuple[Written, ...] = ()
    changed: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: {kind: {} for kind in CHANGES})


def journals(partial: Root) -> list[str]:
    """The names of all journals that this machine sees."""
    try:
        return sorted(filter(_JOURNAL.fullmatch, names_in(partial, JOURNAL_DIRECTORY)))
    except FileNotFoundError:
        return []


def last_run(names: Iterable[str]) -> int:
    """The highest number of a run that has left a journal, 0 where none has."""
    return max((int(name.split("-")[1]) for name in names), default=0)


def has_written(partial: Root, rank: int, runs_before: int) -> bool:
    """Whether a rank has finished bytes of the target in any run after the first so many."""
    mine = [name for name in journals(partial) if name.endswith(f"-rank-{rank:05d}")]
    fresh = [name for name in mine if last_run([name]) > runs_before]
    return any("wrote" in record for name in fresh for _, record in read_lines(partial, name))


def read_journal(
    partial: Root, name: str, boots: Iterable[Sequence[str]], most: int = FEW_WINDOWS
) -> dict[str, Any] | None:
    """What counts of one journal, in JSON values; None where a line is whole and yet no journal's, or no end of them.

    `boots` are (host, boot) of the machines of this run's ranks, `most` is how many lines and windows it can have.
    """
    is_same_boot, safe_bytes, written, lost = False, 0, list[tuple[int, Written]](), []
    changed: dict[str, list[Any]] = {kind: [] for kind in CHANGES}
    with opened(partial, f"{JOURNAL_DIRECTORY}/{name}") as descriptor:
        if last_run([name]) >= _MOST_RUNS or os.fstat(descriptor).st_size > _MOST_BYTES:
            return None
    try:
        for number, (end_bytes, record) in enumerate(read_lines(partial, name)):
            if not _is_record(record) or number + len(written) > most:
                return None
            if number == 0 and record.get("boot"):
                is_same_boot = any([record["host"], record["boot"]] == list(boot) for boot in boots)
            safe_bytes = max(safe_bytes, record.get("mark", 0))
            written += [(end_bytes, from_fields(values)) for values in record.get("wrote", ())]
            lost += [[record["lost"], record["until"]]] if "lost" in record else []
            for kind in changed.keys() & record.keys():
                changed[kind].append(record[kind])
    except ValueError:
        return None
    counted = (one for end_bytes, one in written if is_same_boot or end_bytes <= safe_bytes)
    return {"run": last_run([name]), "wrote": [fields(one) for one in joined(counted)], "lost": lost, **changed}


def fields(written: Written) -> list[Any]:
    """The JSON values of what was written."""
    window, checksum = written
    return [window.file, window.offset_bytes, window.run_bytes, window.stride_bytes, window.runs, checksum]


def from_fields(values: Sequence[Any]) -> Written:
    """What was written, from its JSON values."""
    return Window(*values[:-1]), values[-1]


def joined(written: Iterable[Written]) -> list[Written]:
    """The same bytes in fewer windows: those without gaps that follow each other become one."""
    found: list[Written] = []
    for window, checksum in sorted(written, key=lambda one: (one[0].file, one[0].runs, one[0].offset_bytes)):
        last, before = found[-1] if found else (window, None)
        follows = (last.file, last.offset_bytes + last.run_bytes) == (window.file, window.offset_bytes)
        if follows and before is not None and checksum is not None:
            whole = Window(last.file, last.offset_bytes, last.run_bytes + window.run_bytes)
            found[-1] = whole, isal_zlib.crc32_combine(before, checksum, window.run_bytes)
        else:
            found.append((window, checksum))
    return found


def resume_state_of(records: Sequence[JsonObject], damaged: Iterable[str] = ()) -> ResumeState:
    """What `read_journal` found in every journal, but for files that are not there any more, or not in their size."""
    lost_until = dict.fromkeys(damaged, sys.maxsize)
    for record in records:
        for file, run in record["lost"]:
            lost_until[file] = max(run, lost_until.get(file, 0))
    written = tuple(
        from_fields(values)
        for record in records
        for values in record["wrote"]
        if record["run"] > lost_until.get(values[0], 0)
    )
    changed = {kind: Counter[str]() for kind in CHANGES}
    for kind, of_tensors in changed.items():
        # A block that was read twice, before a run ended and after, counts once.
        reads = {(file, tensor, *place): values for r in records for file, tensor, *place, values in r[kind]}
        for (_, tensor, *_), values in reads.items():
            of_tensors[tensor] += values
    return ResumeState(written, changed)
