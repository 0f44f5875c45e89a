"""How ranks tell each other of progress and failure while their main threads are busy.

A thread on every rank watches torchrun's store. A rank that fails posts its message there and waits; rank 0 prints
it once; then every rank leaves with the same exit code, instead of a crowd of broken connections.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from dist_convert.errors import lost_contact

_POLL_SECONDS = 0.3
_PATIENCE_SECONDS = 10.0


class Channel:
    """One rank's connection to the others, beside the process group; alone, it only prints.

    Args:
        rank, size: of the world.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()  # of the store, whose calls do not return while a network is cut
        self._count_lock = threading.Lock()
        self._unsent_bytes = 0
        self._written_alone_bytes = 0
        self._on_progress: Callable[[int], None] | None = None
        self._long_work: str | None = None
        self._closed = threading.Event()
        self._store = _connect() if size > 1 else None
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self._store is not None:
            self._watcher.start()

    def show_progress(self, on_progress: Callable[[int], None] | None) -> None:
        """Call back with the bytes of all ranks, now and then, on this rank; None ends that."""
        self._on_progress = on_progress

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
            self._wait_for(ranks, name, timeout_seconds)
        except DistError as error:
            raise lost_contact(str(error).splitlines()[0]) from error
        self._long_work = None

    def _wait_for(self, ranks: Sequence[int], name: str, timeout_seconds: float) -> None:
        started = time.monotonic()
        signs = dict.fromkeys(ranks, (0, started))
        asked = started
        while not self._is_set(*(f"{name}/{rank}/done" for rank in ranks)):
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if now - asked < timeout_seconds / 4:
                continue
            asked = now
            for rank, (count, heard) in signs.items():
                latest = self._add(f"{name}/{rank}/alive", 0)
                signs[rank] = (latest, now if latest > count else heard)
                if now - signs[rank][1] > timeout_seconds and not self._is_set(f"{name}/{rank}/done"):
                    raise lost_contact(f"no sign of life from rank {rank} in {timeout_seconds:g} s ({name})")

    def close(self) -> None:
        """Stop watching; call it when all ranks are past the last point where one could fail alone."""
        self._closed.set()
        if self._store is not None:
            self._watcher.join(timeout=_PATIENCE_SECONDS)
        self._exchange_progress()

    def fail(self, message: str, exit_code: int) -> int:
        """Report this rank's failure and wait until it has been printed, once for all ranks.

        Returns:
            The exit code of the failure that was reported first.
        """
        if self._store is None:
            print(message, file=sys.stderr, flush=True)
            return exit_code
        self._closed.set()
        answers: list[int] = []
        reporting = threading.Thread(target=lambda: answers.append(self._report_if_served(message, exit_code)))
        reporting.daemon = True
        reporting.start()
        reporting.join(timeout=2.5 * _PATIENCE_SECONDS)
        if answers:
            return answers[0]
        print(message, file=sys.stderr, flush=True)  # the store is out of reach: others report for themselves
        os._exit(exit_code)

    def _report_if_served(self, message: str, exit_code: int) -> int:
        self._watcher.join(timeout=_PATIENCE_SECONDS)  # Python must not end while a thread is in the store's C++
        try:
            return self._report(message, exit_code)
        except DistError:
            return exit_code  # rank 0, which served the store and has printed the failure, is gone

    def _report(self, message: str, exit_code: int) -> int:
        assert self._store is not None
        with self._lock:
            first = self._store.add("failures", 1) == 1
            if first:
                self._store.set("failure", json.dumps({"message": message, "exit_code": exit_code}))
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline and not self._is_set("printed"):
            if self._rank == 0 and self._is_set("failure"):
                self._print_failure()
            time.sleep(_POLL_SECONDS / 3)
        if self._rank == 0 and not is_served_by_launcher():
            time.sleep(3 * _POLL_SECONDS)  # until the others have read it from the store that this process serves
        return exit_code if first else self._failure_exit_code()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            try:
                if self._is_set("failure"):
                    if self._rank == 0:
                        self._print_failure()
                    self._leave()
                self._exchange_progress()
                if self._long_work is not None:
                    self._add(f"{self._long_work}/{self._rank}/alive", 1)
            except DistError:
                return  # the store is gone: torchrun is ending this run already

    def _leave(self) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline and not self._is_set("printed"):
            time.sleep(_POLL_SECONDS / 3)
        os._exit(self._failure_exit_code())  # the main thread may be inside a collective that never ends

    def _print_failure(self) -> None:
        with self._lock:
            assert self._store is not None
            if not self._store.check(["printed"]):
                print(json.loads(self._store.get("failure"))["message"], file=sys.stderr, flush=True)
                self._store.set("printed", "1")

    def _failure_exit_code(self) -> int:
        with self._lock:
            assert self._store is not None
            return int(json.loads(self._store.get("failure"))["exit_code"])

    def _is_set(self, *keys: str) -> bool:
        with self._lock:
            assert self._store is not None
            return bool(self._store.check(list(keys)))

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


def is_served_by_launcher() -> bool:
    """Whether torchrun itself serves the store, so that it outlives any rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect() -> Store:
    """A connection of our own to the store that torchrun (or rank 0) serves; each restart has its own keys."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )
    return PrefixStore(f"dist_convert/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
