"""How ranks tell each other of progress, failure and signals while their main threads are busy.

A thread on every rank watches the store where they meet. A rank that fails posts its message there and waits; rank 0
prints it once; then every rank leaves with the same exit code, instead of a crowd of broken connections. A signal to
one rank is a failure of all, which leaves main threads some seconds to end between two steps. Every rank posts a beat
a second with what it does, so that one that no longer moves is found out and named.

Inside a program that has called a function (`Embedded`) there is nothing of this: no thread is started, no signal
caught, no process ended, and ranks tell each other only what their collectives do.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from itertools import chain, repeat
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from dist_convert.errors import RESUME, Cancelled, Interrupted, LostRank
from dist_convert.ranks.collectives import named_loss
from dist_convert.ranks.log import Log, tell_torchrun
from dist_convert.ranks.timeout import call_with_timeout
from dist_convert.records import JsonObject, names

BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.3
#: How long what others do at once is waited for.
_PATIENCE_SECONDS = 5.0
#: From a signal until a main thread that has not ended by itself is ended.
_GRACE_SECONDS = 5.0
#: How long a failed rank 0 that serves the store stays for ranks that may still be starting.
_STARTING_SECONDS = 20.0
#: Of the time that ranks wait for a silent one, after so much it is given up, before their collectives fail.
_SILENT_SHARE = 0.9
_STORE_ANSWERS_WITHIN = timedelta(seconds=60)


def _looks(seconds: float) -> Iterator[float]:
    """The times at which to look again for what others do, ever less often, until so many seconds have passed."""
    began, pause_seconds = time.monotonic(), 0.005  # most of it is short
    while (now := time.monotonic()) < began + seconds:
        yield now
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _POLL_SECONDS)


def serve_store(meeting: socket.socket | None = None) -> Store:
    """Serve the store where ranks meet, at MASTER_PORT or on a socket; a LostRank where the port is taken."""
    address, port = meeting.getsockname() if meeting else ("127.0.0.1", int(os.environ["MASTER_PORT"]))
    try:
        # Of the address it only uses the port, and asks itself there; whether others reach it is theirs to find out.
        fd, limit = meeting.detach() if meeting else None, _STORE_ANSWERS_WITHIN
        store = TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=fd)
    except DistError as error:
        expected, found = f"a free port of rank 0's machine: MASTER_PORT={port}", str(error).splitlines()[0]
        remedy = "give another MASTER_PORT"
        raise LostRank("the ranks cannot meet", expected=expected, found=found, remedy=remedy) from error
    return _of_this_start(store)


def _of_this_start(store: Store) -> Store:
    """Each restart by torchrun has its own keys."""
    return PrefixStore(f"dist_convert/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def reach_store(rank: int, size: int, timeout_seconds: float, heed_signals: Callable[[], None]) -> Store:
    """The store where the ranks meet, at the address in the environment.

    `heed_signals` is called several times a second meanwhile; what it raises ends the wait.

    Raises:
        LostRank: nothing there answers as the store does, in so many seconds.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline, found = time.monotonic() + timeout_seconds, ["no answer"]

    def reach() -> Store:
        while time.monotonic() < deadline:
            try:  # in Python, which says why; what torch tries again and again cannot be ended
                socket.create_connection((address, port), timeout=_PATIENCE_SECONDS).close()
            except OSError as error:
                found[0] = error.strerror or str(error)
                time.sleep(_POLL_SECONDS)
                continue
            found[0] = "something listens there that is not rank 0"
            return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_STORE_ANSWERS_WITHIN)
        raise TimeoutError

    try:
        return _of_this_start(call_with_timeout(timeout_seconds, reach, heed_signals))
    except (TimeoutError, DistError) as error:
        what = f"rank {rank} of {size} does not reach rank 0"
        expected = f"it listens at MASTER_ADDR={address}, MASTER_PORT={port}"
        remedy = "check both on every node and whether rank 0 has started, or allow more time with --timeout"
        raise LostRank(what, expected=expected, found=f"{found[0]}, in {timeout_seconds:g} s", remedy=remedy) from error


@dataclass(frozen=True)
class Failures:
    """The failure that ends all ranks, in the store that they share: the first that was posted."""

    store: Store

    def post(self, message: str, exit_code: int, signal_number: int | None = None) -> bool:
        """Post a failure unless another one has been posted; whether it was the first."""
        is_first = self.store.add("failures", 1) == 1
        if is_first:
            failure = {"message": message, "exit_code": exit_code, "signal": signal_number}
            self.store.set("failure", json.dumps(failure))
        return is_first

    def read(self) -> JsonObject | None:
        """The failure's message, exit code and signal; None where all is well."""
        return json.loads(self.store.get("failure")) if self.store.check(["failure"]) else None

    def is_printed(self) -> bool:
        return self.store.check(["printed"])

    def print_once(self) -> None:
        """Print the message, unless another process does; one must have been posted."""
        if self.store.add("printers", 1) == 1:
            print(json.loads(self.store.get("failure"))["message"], file=sys.stderr, flush=True)
            self.store.set("printed", "1")

    def await_print(self, seconds: float, *, prints: bool = False) -> None:
        """Wait so long at most until the message has been printed, by this process where that is its part."""
        for _ in _looks(seconds):
            if self.is_printed():
                return
            if prints and self.read() is not None:
                self.print_once()


@dataclass(frozen=True)
class Beat:
    """What a rank last said: how often it has, where it is, what its main thread does, and the bytes that are done."""

    rank: int
    count: int
    host: str
    doing: str
    done_bytes: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, last heard of while {self.doing}"

    @property
    def is_alone(self) -> bool:
        """Whether it waits for nobody; in anything else it may wait for others as long as they take."""
        return self.doing.startswith(("reading step", "writing step", "moving step"))


class Channel:
    """One rank's connection to the others, beside the process group; alone, it prints and heeds signals.

    Where no launcher serves the store, rank 0 does, from here on.

    Args:
        rank, size: of the world.
        take_signal: tells the number of a signal that has come and ends the conversion; see `signals.noted`.
        timeout_seconds: within which all ranks must meet. One that is later not heard of, or stays in one step, for
            nine tenths of it has failed: before its silence breaks a collective.
        log: for what rank 0 says.

    Raises:
        LostRank: rank 0 cannot be reached.
        Interrupted: a signal has come before.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        take_signal: Callable[[], int | None] = lambda: None,
        timeout_seconds: float = _STARTING_SECONDS,
        log: Log | None = None,
    ) -> None:
        self._rank, self._size = rank, size
        self._take_signal = take_signal
        self._log = log or Log()
        self._lock = threading.Lock()  # of the next two
        self._stopped_by: int | None = None
        self._done_bytes = self._done_before_bytes = 0  # of all work, and of all ranks' finished work
        self._on_progress: Callable[[int], object] | None = None
        self._doing = "reading headers and planning"
        self._beats, self._beat_at = 0, 0.0
        self._beat_keys = [f"beat/{rank}" for rank in range(size)]
        #: What each rank last said, when it has spoken, and since when it does the same.
        self._said: dict[int, tuple[Beat, float, float]] = {}
        self._printer_is_silent = False
        # Whether what has started the ranks serves the store, so that it outlives any of them.
        self._has_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._starting_until = time.monotonic() + _STARTING_SECONDS
        self._served: Store | None = None
        if size > 1 and not self._has_launcher:
            self._served = serve_store() if rank == 0 else None
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch's process group joins there, too
        self._timeout_seconds = timeout_seconds
        self._store = reach_store(rank, size, timeout_seconds, self._heed_signal) if size > 1 else None
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def doing(self, what: str) -> None:
        """Note what the main thread does from now on; raises `Interrupted` where the work is to end."""
        self._doing = what
        self._heed_signal()

    def meet(self) -> None:
        """Wait until all ranks have connected; a LostRank names those that have not, an Interrupted a signal."""
        if self._store is None:
            return
        with named_loss():
            for _ in _looks(self._timeout_seconds):
                if self._store.check(self._beat_keys):
                    return
                self._heed_signal()
            missing = [rank for rank, key in enumerate(self._beat_keys) if not self._store.check([key])]
        if not missing:  # the last has come at the last moment
            return
        self._starting_until = 0.0  # whoever has not come by now is not waited for
        raise LostRank(
            f"{self._size - len(missing)} of {self._size} ranks have connected",
            expected=f"all of them within {self._timeout_seconds:g} s",
            found=f"nothing from rank {names(map(str, missing))}",
            remedy="look at the log of the first of these: has it started, with the same MASTER_ADDR, MASTER_PORT and "
            "WORLD_SIZE? Allow more time with --timeout",
        )

    def say(self, event: str, text: str, **details: Any) -> None:
        """Tell the user, on rank 0: an event's kind, its text for people, and JSON values for programs."""
        if self._rank == 0:
            self._log.say(event, text, **details)

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[None]:
        """Show the progress of all ranks until the block ends."""
        if self._rank != 0:
            yield
            return
        with self._log.progress(total_bytes, what) as update:
            before_bytes = self._done_before_bytes
            self._on_progress = lambda done_bytes: update(max(0, done_bytes - before_bytes))
            yield
            self._on_progress = None
            self._done_before_bytes += total_bytes
            update(total_bytes)  # the last counts of other ranks may still be on their way

    def add_progress(self, size_bytes: int) -> None:
        """Count bytes that are done; any thread may call it."""
        with self._lock:
            self._done_bytes += size_bytes
        if self._store is None and (show := self._on_progress) is not None:
            show(self._done_bytes)

    def close(self) -> None:
        """Stop watching; call it when all ranks are past the last point where one could fail alone."""
        self._closed.set()
        self._watcher.join(timeout=_PATIENCE_SECONDS)

    def fail(self, message: str, exit_code: int) -> int:
        """Report this rank's failure and wait until it has been printed, once for all ranks.

        Returns:
            The exit code of the failure that was reported first.
        """
        self._closed.set()
        if self._store is None:
            print(message, file=sys.stderr, flush=True)
            return exit_code
        failures = Failures(self._store)
        try:
            return call_with_timeout(2.5 * _PATIENCE_SECONDS, lambda: self._report(failures, message, exit_code))
        except TimeoutError:
            print(message, file=sys.stderr, flush=True)  # the store is out of reach: others report for themselves
            os._exit(exit_code)

    def _report(self, failures: Failures, message: str, exit_code: int) -> int:
        self._watcher.join(timeout=_PATIENCE_SECONDS)  # Python must not end while a thread is in the store's C++
        try:
            is_first = failures.post(message, exit_code, self._stopped_by)
            prints_soon = failures.store.check(self._beat_keys[:1]) and not self._printer_is_silent
            failures.await_print(_PATIENCE_SECONDS if prints_soon else 0.0, prints=self._rank == 0)
            if is_first:
                failures.print_once()  # rank 0 has not
            posted = failures.read()
            self._leave(failures.store)
            return exit_code if is_first or posted is None else int(posted["exit_code"])
        except DistError:  # who served the store is gone: rank 0, which has printed the failure, or its whole machine
            if self._has_launcher and os.environ.get("LOCAL_RANK") == "0":
                print(message, file=sys.stderr, flush=True)
            return exit_code

    def _leave(self, store: Store) -> None:
        """Have read the failure; who serves the store stays until all others have."""
        gone, seconds = store.add("gone", 1), 3 * _POLL_SECONDS
        if self._stopped_by is None and not self._heard(store):
            seconds = max(seconds, self._starting_until - time.monotonic())
        for _ in _looks(seconds if self._served is not None else 0.0):
            if gone == self._size:
                return
            gone = store.add("gone", 0)

    def explain(self, error: LostRank) -> None:
        """Say in an error which rank it may be that keeps the others waiting, or is gone; backends do not know."""
        store = self._store
        if store is None:
            return
        try:
            before, after = call_with_timeout(2 * _PATIENCE_SECONDS, lambda: self._heard_twice(store))
        except (TimeoutError, DistError):
            error.found = f"{os.environ.get('MASTER_ADDR')}, where all ranks meet, does not answer"
            return
        silent = [beat for beat in after if beat in before]
        self._printer_is_silent = any(beat.rank == 0 for beat in silent)
        found = silent
        if not silent and "tim" in error.found.lower():  # else a connection broke, and whoever is gone is silent
            found = [beat for beat in after if beat.is_alone]
        if found:
            error.what = f"{found[0]}, does not answer"
            error.found = "; ".join(map(str, found[1:])) or error.found

    def _heard_twice(self, store: Store) -> tuple[list[Beat], list[Beat]]:
        """Every rank's last beat, and again when each has had the time for another."""
        if before := self._heard(store):
            time.sleep(2.5 * BEAT_SECONDS)
        return before, self._heard(store)

    def _heard(self, store: Store) -> list[Beat]:
        """Every rank's last beat; none before all have given one."""
        texts = store.multi_get(self._beat_keys) if store.check(self._beat_keys) else []
        return [Beat(*json.loads(text)) for text in texts]

    def _watch(self) -> None:
        if self._store is not None:
            with suppress(DistError):  # the store is gone; what served it is ending this run, or has ended
                self._watch_store(self._store, Failures(self._store))
        # Without a store, too: the signal that tells of a launcher's end comes after its connections broke.
        while (number := self._signal()) is None:
            self._tick()
            if self._closed.wait(_POLL_SECONDS):
                return
        if self._closed.wait(_GRACE_SECONDS):
            return
        if self._store is None:
            print(Interrupted(number), file=sys.stderr, flush=True)
        os._exit(128 + number)

    def _watch_store(self, store: Store, failures: Failures) -> None:
        for pause_seconds in chain([0.0], repeat(_POLL_SECONDS)):  # the first beat at once: a rank may be lost soon
            if self._closed.wait(pause_seconds):
                return
            if (number := self._signal()) is not None:
                stop = Interrupted(number)
                failures.post(str(stop), stop.exit_code, number)
            if (failure := failures.read()) is not None:
                if self._rank == 0:
                    failures.print_once()
                with self._lock:
                    self._stopped_by = self._stopped_by or failure["signal"]
                tell_torchrun(failure["message"])  # this rank ends with the failure of another
                if self._stopped_by is not None and self._closed.wait(_GRACE_SECONDS):
                    return
                failures.await_print(_PATIENCE_SECONDS)
                self._leave(store)
                os._exit(failure["exit_code"])  # the main thread may be inside a collective that never ends
            self._beat(store, failures)
            self._tick()

    def _tick(self) -> None:
        if self._rank == 0:
            self._log.tick(self._doing)

    def _signal(self) -> int | None:
        """The signal that ends this rank, if one has come, here or on another rank."""
        with self._lock:
            self._stopped_by = self._stopped_by or self._take_signal()
            return self._stopped_by

    def _heed_signal(self) -> None:
        if (number := self._signal()) is not None:
            raise Interrupted(number)

    def _beat(self, store: Store, failures: Failures) -> None:
        """Beat, if it is time; on rank 0, show progress, and look which ranks have not moved for too long."""
        if time.monotonic() < self._beat_at + BEAT_SECONDS:
            return
        self._beat_at, self._beats = time.monotonic(), self._beats + 1
        beat = Beat(self._rank, self._beats, socket.gethostname(), self._doing, self._done_bytes)
        store.set(self._beat_keys[self._rank], json.dumps(astuple(beat)))
        if self._rank != 0:
            return
        beats = self._heard(store)
        if (show := self._on_progress) is not None:
            show(sum(beat.done_bytes for beat in beats))
        if silent := self._silent(beats):
            remedy = "check that machine and its file systems, or allow more time with --timeout"
            others = "; ".join(map(str, silent[1:]))
            error = LostRank(f"{silent[0]}, has made no progress for too long", found=others, remedy=remedy)
            error.resume = RESUME
            failures.post(str(error), error.exit_code)

    def _silent(self, beats: Iterable[Beat]) -> list[Beat]:
        """The ranks that have been silent, or alone in the same step, for longer than they may."""
        now, found = time.monotonic(), []
        for beat in beats:
            last, heard, began = self._said.get(beat.rank, (beat, now, now))
            heard = heard if beat.count == last.count else now
            began = began if beat.doing == last.doing else now
            self._said[beat.rank] = (beat, heard, began)
            if now - (min(heard, began) if beat.is_alone else heard) > _SILENT_SHARE * self._timeout_seconds:
                found.append(beat)
        return found


@dataclass
class Embedded:
    """What a `Channel` is to the ranks of a command, to those of a program; it says nothing, as a report holds all.

    Attributes:
        on_progress: is called with the bytes that this rank has done, and those of the whole work, from any thread.
        cancel: is asked between two steps whether to end.
    """

    on_progress: Callable[[int, int], None] | None = None
    cancel: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._done_bytes = self._total_bytes = 0

    def doing(self, what: str) -> None:
        if self.cancel is not None and self.cancel():
            raise Cancelled

    def say(self, event: str, text: str, **details: Any) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[None]:
        self._done_bytes, self._total_bytes = 0, total_bytes
        yield

    def add_progress(self, size_bytes: int) -> None:
        with self._lock:
            self._done_bytes += size_bytes
            if self.on_progress is not None:
                self.on_progress(self._done_bytes, self._total_bytes)


#: What a conversion tells those who wait for it.
Control = Channel | Embedded
