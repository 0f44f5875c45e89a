"""Where a rank's time goes: seconds by phase for the final report, and `--trace FILE` with every stretch of it.

A trace is for chrome://tracing and https://ui.perfetto.dev. Its format is the array of "Trace Event Format" (the
document of that name by the Catapult project): one event a line, "X" for a stretch and "M" for names; times are
microseconds. The closing bracket may be missing, so that what a failed conversion leaves can be looked at too.
"""

import errno
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_convert.errors import UsageError, shown_line
from dist_convert.ranks.collectives import World, barrier, gather_objects
from dist_convert.records import JsonObject
from dist_convert.write.files import open_below
from dist_convert.write.partial import partial_of
from dist_convert.write.trees import lies_in

#: What is timed. The main thread gathers and waits, while others read, place and write; so the seconds of all phases
#: together exceed those that have passed.
PHASES = ("read", "gather", "place", "write", "wait")


class Timeline:
    """Adds up what each phase takes, and puts every stretch of it into a trace, if there is one."""

    def __init__(self, trace: "_Trace | None" = None) -> None:
        self._trace = trace
        self._spent: dict[tuple[str, int], float] = defaultdict(float)

    @contextmanager
    def during(self, phase: str, subject: str, size_bytes: int = 0) -> Iterator[None]:
        """Count what the block takes, unless it fails.

        Args:
            phase: one of `PHASES`.
            subject: the tensor or step that the time is spent on.
            size_bytes: that are read, received, placed or written; 0 where that means nothing.
        """
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self._spent[phase, threading.get_ident()] += end - start  # a key for each thread: none waits for another
        if self._trace:
            self._trace.add(phase, subject, start, end, size_bytes)

    def seconds(self) -> dict[str, float]:
        """What each phase has taken, over all threads."""
        return {phase: sum(s for (of, _), s in self._spent.items() if of == phase) for phase in PHASES}


_BUFFER_BYTES = 64 << 10
#: Names what may be replaced by another trace; viewers pass over it.
_FIRST_LINE = b'[{"name":"trace of dist_convert","ph":"M","pid":0},\n'


@contextmanager
def traced(path: Path | None, world: World, target: Path) -> Iterator[Timeline]:
    """A timeline for the block, written to a file if there is a path.

    The ranks of a node share a file. With several nodes its name gets the node's number: `trace-node1.json`. A trace
    that cannot be written any more is given up with a line that says so; the conversion goes on. No trace can lie in
    the conversion's target, which is renamed and replaced.

    Raises:
        UsageError: the file cannot be made, or is something else than a trace.
    """
    if path is None:
        yield Timeline()
        return
    if len(world.first_ranks) > 1:
        path = path.with_name(f"{path.stem}-node{world.node}{path.suffix}")
    is_first = world.rank in world.first_ranks
    if is_first:
        _make(path, target)
    start_ns = gather_objects(world, time.time_ns())[0]  # of rank 0, for all
    trace = _Trace(path, world.rank, time.perf_counter() - (time.time_ns() - start_ns) / 1e9)
    try:
        yield Timeline(trace)
    finally:
        trace.close()
    barrier(world)
    if is_first:
        last = {"pid": world.rank, "name": "process_sort_index", "ph": "M", "args": {"sort_index": world.rank}}
        _append(path, json.dumps(last).encode() + b"]\n")


def _make(path: Path, target: Path) -> None:
    found, directory = "", path.parent.resolve()
    try:
        if any(lies_in(directory / path.name, used) for used in (target, partial_of(target))):
            found = f"a path inside of the target {target}"
        else:
            with os.fdopen(open_below(directory, path.name, os.O_RDWR | os.O_CREAT), "r+b") as file:
                if file.read(len(_FIRST_LINE)) in (b"", _FIRST_LINE):
                    file.seek(0)
                    file.truncate()
                    file.write(_FIRST_LINE)
                else:
                    found = "a file that is not a trace"
    except OSError as error:
        found = error.strerror or str(error)
    if found:
        raise UsageError("the trace cannot be written", path, found=found, remedy="give another --trace")


def _append(path: Path, lines: bytes) -> bool:
    """Add lines behind those of all ranks of the node, in one call, between whose lines none come; whether it could."""
    try:
        with os.fdopen(open_below(path.parent.resolve(), path.name, os.O_WRONLY | os.O_APPEND), "ab", 0) as file:
            if file.write(lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        print(shown_line(f"{path}: the trace ends before the conversion: {error.strerror}"), file=sys.stderr)
        return False
    return True


class _Trace:
    """One rank's events on their way to the file; any thread may add one."""

    def __init__(self, path: Path, rank: int, zero_seconds: float) -> None:
        self._path = path
        self._rank = rank
        self._zero_seconds = zero_seconds
        self._lock = threading.Lock()
        self._lines = bytearray()
        self._goes_on = True
        self._threads: dict[str, int] = {}
        self._put({"name": "process_name", "ph": "M", "args": {"name": f"rank {rank}"}})
        self._number_of("main")

    def add(self, phase: str, subject: str, start_seconds: float, end_seconds: float, size_bytes: int) -> None:
        """A stretch of the calling thread's time, in seconds of `time.perf_counter`."""
        is_main = threading.current_thread() is threading.main_thread()
        thread = self._number_of("main" if is_main else threading.current_thread().name)
        begin, duration = start_seconds - self._zero_seconds, end_seconds - start_seconds
        times = {"ts": round(begin * 1e6, 1), "dur": round(duration * 1e6, 1)}
        self._put({"name": phase, "ph": "X", "tid": thread, **times, "args": {"what": subject, "bytes": size_bytes}})

    def _number_of(self, thread: str) -> int:
        """Of a thread of this rank, which is named in the trace when it is first seen."""
        with self._lock:
            is_new = thread not in self._threads
            number = self._threads.setdefault(thread, len(self._threads))
        if is_new:
            self._put({"name": "thread_name", "ph": "M", "tid": number, "args": {"name": thread}})
        return number

    def close(self) -> None:
        with self._lock:
            self._flush()

    def _put(self, event: JsonObject) -> None:
        line = json.dumps({"pid": self._rank, **event}, separators=(",", ":")).encode() + b",\n"
        with self._lock:
            self._lines += line
            if len(self._lines) >= _BUFFER_BYTES:
                self._flush()

    def _flush(self) -> None:
        self._goes_on = self._goes_on and _append(self._path, bytes(self._lines))
        self._lines.clear()
