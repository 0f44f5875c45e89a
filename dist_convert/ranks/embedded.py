"""Ranks inside a program that has threads, signal handlers and perhaps a process group of its own.

Nothing of the program is touched: no thread is started, no signal caught, no process ended. What ranks tell each other
beside their collectives goes over the control group, and only at the points where all of them meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from dist_convert.errors import Cancelled
from dist_convert.ranks.collectives import World, barrier
from dist_convert.ranks.listener import Listener


class Control(Protocol):
    """What a command tells those who wait for it, and what ranks do while others wait."""

    def doing(self, what: str) -> None:
        """Note what the main thread does from now on; raises `Interrupted` where the work is to end."""

    def add_progress(self, size_bytes: int) -> None:
        """Count bytes that are done; any thread may call it."""

    def progress(self, total_bytes: int, what: str) -> AbstractContextManager[None]:
        """Show the progress of all ranks until the block ends."""

    def say(self, event: str, text: str, **details: Any) -> None:
        """Tell the user, on rank 0; see `Listener`."""

    def run_on(self, ranks: Sequence[int], name: str, work: Callable[[], object], timeout_seconds: float) -> None:
        """Do something on some ranks, however long it takes; all return when it is done on each of them."""


class Embedded:
    """A `Control` without threads or a store.

    Args:
        world: this rank.
        listener: hears what rank 0 says, and the progress of this rank.
        cancel: is asked between two steps whether to end.
    """

    def __init__(self, world: World, listener: Listener, cancel: Callable[[], bool] | None = None) -> None:
        self._world = world
        self._listener = listener
        self._cancel = cancel
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._update: Callable[[int], None] | None = None

    def doing(self, what: str) -> None:
        """See `Control`."""
        if self._cancel is not None and self._cancel():
            raise Cancelled

    def add_progress(self, size_bytes: int) -> None:
        """See `Control`."""
        with self._lock:
            self._done_bytes += size_bytes
            if self._update is not None:
                self._update(self._done_bytes)

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[None]:
        """See `Control`."""
        with self._listener.progress(total_bytes, what) as update:
            self._done_bytes, self._update = 0, update
            try:
                yield
            finally:
                self._update = None

    def say(self, event: str, text: str, **details: Any) -> None:
        """See `Control`."""
        if self._world.rank == 0:
            self._listener.say(event, text, **details)

    def run_on(self, ranks: Sequence[int], name: str, work: Callable[[], object], timeout_seconds: float) -> None:
        """See `Control`; how long it may take is decided by the control group."""
        if self._world.rank in ranks:
            work()
        barrier(self._world)
