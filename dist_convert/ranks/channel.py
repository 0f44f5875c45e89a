"""How ranks tell each other of progress, failure and signals while their main threads are busy.

A thread on every rank watches the store where they meet. A rank that fails posts its message there and waits; rank 0
prints it once; then every rank leaves with the same exit code, instead of a crowd of broken connections. A signal to
one rank is a failure of all, which leaves main threads some seconds to end between two steps. Every rank posts a beat
a second with what it does, so that one that no longer moves is found out and named.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import chain, repeat
from typing import Any, Protocol

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from dist_convert.errors import RESUME, Interrupted, LostRank, lost_contact
from dist_convert.ranks.answer import answer_within
from dist_convert.ranks.listener import Listener, TextLog
from dist_convert.ranks.signals import Signals


def is_served_by_launcher() -> bool:
    """Whether what has started the ranks serves the store, so that it outlives any of them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect() -> Store:
    """A connection of our own to the store where the ranks meet; each restart has its own keys."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )
    return _with_prefix(store)


def serve(meeting: socket.socket) -> Store:
    """Serve the store for ranks of this machine, on a socket that listens already and becomes the store's own."""
    address, port = meeting.getsockname()
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=meeting.detach())
    return _with_prefix(store)


def _with_prefix(store: Store) -> Store:
    return PrefixStore(f"dist_convert/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class KeyValueStore(Protocol):
    """The part of torch's store that ranks talk through."""

    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def set(self, key: str, value: str, /) -> None: ...


class Failures:
    """A rank's view of the failure.

    Args:
        store: of all ranks.
        lock: held around every use of the store.
    """

    def __init__(self, store: KeyValueStore, lock: threading.Lock) -> None:
        self._store = store
        self._lock = lock

    def post(self, message: str, exit_code: int, signal_number: int | None = None) -> bool:
        """Post a failure unless another one has been posted; whether it was the first."""
        with self._lock:
            first = self._store.add("failures", 1) == 1
            if first:
                failure = {"message": message, "exit_code": exit_code, "signal": signal_number}
                self._store.set("failure", json.dumps(failure))
        return first

    def read(self) -> dict[str, Any] | None:
        """The failure's message, exit code and signal; None where all is well."""
        with self._lock:
            return json.loads(self._store.get("failure")) if self._store.check(["failure"]) else None

    def is_printed(self) -> bool:
        with self._lock:
            return self._store.check(["printed"])

    def print_once(self) -> None:
        """Print the message, unless another process does; one must have been posted."""
        with self._lock:
            if self._store.add("printers", 1) == 1:
                print(json.loads(self._store.get("failure"))["message"], file=sys.stderr, flush=True)
                self._store.set("printed", "1")


BEAT_SECONDS = 1.0
#: How often the store is asked whether work is done: often at first, as most of it is short.
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.005, 0.3
#: What a rank does alone; in anything else it may wait for others as long as they take.
_ALONE = ("reading step", "writing step")


@dataclass(frozen=True)
class Beat:
    """What a rank last said: how often it has, on which machine it is, and what its main thread does.

    `is_silent` where it has not said anything for a while.
    """

    rank: int
    count: int
    host: str
    doing: str
    is_silent: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, last heard of while {self.doing}"


@dataclass
class Watchdog:
    """Remembers since when each rank has said the same.

    Attributes:
        patience_seconds: how long it may.
    """

    patience_seconds: float
    _heard: dict[int, tuple[int, float]] = field(default_factory=dict)
    _seen_doing: dict[int, tuple[str, float]] = field(default_factory=dict)

    def look(self, beats: Iterable[Beat], now_seconds: float) -> list[Beat]:
        """The ranks that have been silent, or in the same step, for longer than they may."""
        found = []
        for beat in beats:
            count, since = self._heard.get(beat.rank, (-1, now_seconds))
            if count != beat.count:
                since = now_seconds
            self._heard[beat.rank] = (beat.count, since)
            doing, doing_since = self._seen_doing.get(beat.rank, ("", now_seconds))
            if doing != beat.doing:
                doing_since = now_seconds
            self._seen_doing[beat.rank] = (beat.doing, doing_since)
            is_stuck = beat.doing.startswith(_ALONE) and now_seconds - doing_since > self.patience_seconds
            if is_stuck or now_seconds - since > self.patience_seconds:
                found.append(beat)
        return found


def suspects(before: Sequence[Beat], after: Sequence[Beat]) -> list[Beat]:
    """Who keeps the others waiting: the ranks that were silent between two looks, else those that wait for nobody."""
    counts = {beat.rank: beat.count for beat in before}
    silent = [replace(beat, is_silent=True) for beat in after if counts.get(beat.rank) == beat.count]
    return silent or [beat for beat in after if beat.doing.startswith(_ALONE)]


class Pulse:
    """One rank's beats in the store, and its view of the others'.

    Args:
        rank, size: of the world.
        patience_seconds: see `Watchdog`.
    """

    def __init__(self, rank: int, size: int, patience_seconds: float) -> None:
        self._rank = rank
        self._keys = [f"beat/{rank}" for rank in range(size)]
        self._count = 0
        self._beat_at = 0.0
        self._watchdog = Watchdog(patience_seconds)

    def beat(self, store: KeyValueStore, lock: threading.Lock, doing: str) -> list[Beat]:
        """Beat, if it is time; rank 0 learns which ranks have not moved for too long."""
        now = time.monotonic()
        if now < self._beat_at + BEAT_SECONDS:
            return []
        self._beat_at, self._count = now, self._count + 1
        with lock:
            store.set(self._keys[self._rank], json.dumps([self._rank, self._count, socket.gethostname(), doing]))
        return [] if self._rank else self._watchdog.look(self.heard(store, lock), now)

    def heard(self, store: KeyValueStore, lock: threading.Lock) -> list[Beat]:
        """Every rank's last beat; none before all have given one."""
        with lock:
            texts = store.multi_get(self._keys) if store.check(self._keys) else []
        return [Beat(*json.loads(text)) for text in texts]

    def suspects(self, store: KeyValueStore, lock: threading.Lock) -> list[Beat]:
        """Who keeps the others waiting, or is gone; it takes some seconds to find out."""
        before = self.heard(store, lock)
        time.sleep(2.5 * BEAT_SECONDS)
        return suspects(before, self.heard(store, lock))


def wait_for_work(
    ranks: Sequence[int],
    name: str,
    timeout_seconds: float,
    is_set: Callable[[str], bool],
    count_of: Callable[[str], int],
) -> None:
    """Wait until work of some ranks is done, as long as they give signs of life.

    Args:
        ranks: that work.
        name: of the work: a rank's keys in the store are `NAME/RANK/done`, and `NAME/RANK/alive`, which it counts up.
        timeout_seconds: how long a rank may show no sign of life.
        is_set, count_of: of a key.

    Raises:
        LostRank: a rank is silent for longer.
    """
    asked, pause_seconds = time.monotonic(), _FIRST_POLL_SECONDS
    signs = dict.fromkeys(ranks, (0, asked))
    while not all(is_set(f"{name}/{rank}/done") for rank in ranks):
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _LAST_POLL_SECONDS)
        now = time.monotonic()
        if now - asked < timeout_seconds / 4:
            continue
        asked = now
        for rank, (count, heard) in signs.items():
            latest = count_of(f"{name}/{rank}/alive")
            signs[rank] = (latest, now if latest > count else heard)
            if now - signs[rank][1] > timeout_seconds and not is_set(f"{name}/{rank}/done"):
                raise lost_contact(f"no sign of life from rank {rank} in {timeout_seconds:g} s ({name})")


_POLL_SECONDS = 0.3
_PATIENCE_SECONDS = 5.0
#: From a signal until a main thread that has not ended by itself is ended.
_GRACE_SECONDS = 5.0


class Channel:
    """One rank's connection to the others, beside the process group; alone, it prints and heeds signals.

    Args:
        rank, size: of the world.
        signals: that end the conversion.
        silent_seconds: after which a rank that is not heard of, or stays in one step, has failed.
        listener: hears what rank 0 says; None: standard error.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        signals: Signals | None = None,
        silent_seconds: float = math.inf,
        listener: Listener | None = None,
    ) -> None:
        self._rank = rank
        self._listener = listener or TextLog()
        self._signals = signals
        self._lock = threading.Lock()  # of the store, whose calls do not return while a network is cut
        self._count_lock = threading.Lock()
        self._unsent_bytes = 0
        self._written_alone_bytes = 0
        self._on_progress: Callable[[int], None] | None = None
        self._long_work: str | None = None
        self._closed = threading.Event()
        self._stopped_by: int | None = None
        self._doing = "starting"
        self._pulse = Pulse(rank, size, silent_seconds)
        self._printer_is_silent = False
        self._store = connect() if size > 1 else None
        self._failures = Failures(self._store, self._lock) if self._store is not None else None
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def doing(self, what: str) -> None:
        """Note what this rank's main thread does from now on, for others to know where it stands.

        Raises:
            Interrupted: a signal has arrived, here or on another rank.
        """
        self._doing = what
        if self._signals is not None and self._stopped_by is None:
            self._stopped_by = self._signals.noted
        if self._stopped_by is not None:
            raise Interrupted(self._stopped_by)

    def say(self, event: str, text: str, **details: Any) -> None:
        """See `Control`."""
        if self._rank == 0:
            self._listener.say(event, text, **details)

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[None]:
        """See `Control`."""
        if self._rank != 0:
            yield
            return
        with self._listener.progress(total_bytes, what) as update:
            self._on_progress = update
            yield
            self._on_progress = None
            update(total_bytes)  # the last counts of other ranks may still be on their way

    def add_progress(self, size_bytes: int) -> None:
        """Count bytes that this rank has written; any thread may call it."""
        with self._count_lock:
            self._unsent_bytes += size_bytes
        if self._store is None:
            self._exchange_progress()

    def run_on(self, ranks: Sequence[int], name: str, work: Callable[[], object], timeout_seconds: float) -> None:
        """Do something on some ranks, however long it takes; all return when it is done on each of them.

        Args:
            ranks: that do it. The others wait, outside of any collective.
            name: of the work, once in a run.
            work: what these ranks do. Where it fails, all leave as with any failure.
            timeout_seconds: how long such a rank may show no sign of life.

        Raises:
            ConversionError: a rank is silent for longer.
        """
        if self._rank in ranks:
            self._long_work = name
            work()
        if self._store is None:
            return  # alone
        try:
            if self._rank in ranks:
                self._add(f"{name}/{self._rank}/done", 1)
            wait_for_work(ranks, name, timeout_seconds, self._is_set, lambda key: self._add(key, 0))
        except DistError as error:
            raise lost_contact(str(error).splitlines()[0]) from error
        self._long_work = None

    def close(self) -> None:
        """Stop watching; call it when all ranks are past the last point where one could fail alone."""
        self._closed.set()
        self._watcher.join(timeout=_PATIENCE_SECONDS)
        self._exchange_progress()

    def fail(self, message: str, exit_code: int) -> int:
        """Report this rank's failure and wait until it has been printed, once for all ranks.

        Returns:
            The exit code of the failure that was reported first.
        """
        self._closed.set()
        if self._failures is None:
            print(message, file=sys.stderr, flush=True)
            return exit_code
        try:
            return answer_within(2.5 * _PATIENCE_SECONDS, lambda: self._report_if_served(message, exit_code))
        except TimeoutError:
            print(message, file=sys.stderr, flush=True)  # the store is out of reach: others report for themselves
            os._exit(exit_code)

    def _report_if_served(self, message: str, exit_code: int) -> int:
        assert self._failures is not None
        self._watcher.join(timeout=_PATIENCE_SECONDS)  # Python must not end while a thread is in the store's C++
        try:
            return self._report(self._failures, message, exit_code)
        except DistError:  # who served the store is gone: rank 0, which has printed the failure, or its whole machine
            if is_served_by_launcher() and os.environ.get("LOCAL_RANK") == "0":
                print(message, file=sys.stderr, flush=True)
            return exit_code

    def _report(self, failures: Failures, message: str, exit_code: int) -> int:
        first = failures.post(message, exit_code, self._stopped_by)
        deadline = time.monotonic() + (0.0 if self._printer_is_silent else _PATIENCE_SECONDS)
        while time.monotonic() < deadline and not failures.is_printed():
            if self._rank == 0 and failures.read() is not None:
                failures.print_once()
            time.sleep(_POLL_SECONDS / 3)
        if first:
            failures.print_once()  # rank 0 has not
        if self._rank == 0 and not is_served_by_launcher():
            time.sleep(3 * _POLL_SECONDS)  # until the others have read it from the store that this process serves
        posted = failures.read()
        return exit_code if first or posted is None else int(posted["exit_code"])

    def explain(self, error: LostRank) -> None:
        """Say in an error which rank it may be that keeps the others waiting, or is gone; backends do not know."""
        store = self._store
        if store is None:
            return
        try:
            found = answer_within(2 * _PATIENCE_SECONDS, lambda: self._pulse.suspects(store, self._lock))
        except (TimeoutError, DistError):
            error.found = f"{os.environ.get('MASTER_ADDR')}, where all ranks meet, does not answer; {error.found}"
            return
        if "tim" not in error.found.lower():  # a connection that broke: whoever is gone is silent
            found = [beat for beat in found if beat.is_silent]
        if found:
            self._printer_is_silent = any(beat.rank == 0 for beat in found)
            error.what = f"{found[0]}, does not answer"
            error.found = "; ".join(map(str, found[1:])) or error.found

    def _watch(self) -> None:
        for pause_seconds in chain([0.0], repeat(_POLL_SECONDS)):  # the first beat at once: a rank may be lost soon
            if self._closed.wait(pause_seconds):
                return
            try:
                self._heed_signals()
                if self._failures is None:
                    continue
                failure = self._failures.read()
                if failure is not None:
                    if self._rank == 0:
                        self._failures.print_once()
                    self._leave(self._failures, failure)
                    return
                self._exchange_progress()
                self._exchange_beats(self._failures)
                if self._long_work is not None:
                    self._add(f"{self._long_work}/{self._rank}/alive", 1)
            except DistError:  # the store is gone; what served it is ending this run, or has ended
                self._watch_signals()
                return

    def _watch_signals(self) -> None:
        """Heed signals without a store; the one that tells of the launcher's end comes after its connections broke."""
        while self._stopped_by is None:
            if self._closed.wait(_POLL_SECONDS):
                return
            self._take_signal()
        if not self._closed.wait(_GRACE_SECONDS):
            os._exit(128 + self._stopped_by)

    def _take_signal(self) -> None:
        if self._signals is not None and self._stopped_by is None:
            self._stopped_by = self._signals.take()

    def _heed_signals(self) -> None:
        self._take_signal()
        if self._stopped_by is None:
            return
        stop = Interrupted(self._stopped_by)
        if self._failures is not None:
            self._failures.post(str(stop), stop.exit_code, self._stopped_by)
        elif not self._closed.wait(_GRACE_SECONDS):
            print(stop, file=sys.stderr, flush=True)
            os._exit(stop.exit_code)

    def _leave(self, failures: Failures, failure: Mapping[str, Any]) -> None:
        self._stopped_by = self._stopped_by or failure["signal"]
        if self._stopped_by is not None and self._closed.wait(_GRACE_SECONDS):
            return
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline and not failures.is_printed():
            time.sleep(_POLL_SECONDS / 3)
        os._exit(failure["exit_code"])  # the main thread may be inside a collective that never ends

    def _exchange_beats(self, failures: Failures) -> None:
        assert self._store is not None
        silent = self._pulse.beat(self._store, self._lock, self._doing)
        if silent:
            error = LostRank(
                f"{silent[0]}, has not moved for too long",
                found="; ".join(map(str, silent[1:])),
                remedy="look at that machine and its file systems, or allow more with --timeout",
            )
            error.resume = RESUME
            failures.post(str(error), error.exit_code)

    def _is_set(self, key: str) -> bool:
        with self._lock:
            return self._store is not None and bool(self._store.check([key]))

    def _add(self, key: str, count: int) -> int:
        with self._lock:
            assert self._store is not None
            return int(self._store.add(key, count))

    def _exchange_progress(self) -> None:
        with self._lock:
            with self._count_lock:
                new_bytes, self._unsent_bytes = self._unsent_bytes, 0
            self._written_alone_bytes += new_bytes
            all_bytes = self._written_alone_bytes
            if self._store is not None and (new_bytes or self._on_progress is not None):
                all_bytes = self._store.add("written", new_bytes)
        if self._on_progress is not None:
            self._on_progress(all_bytes)
