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


class Control(Protocol):
    """What a command tells those who wait for it, and what ranks do while others wait."""

    def doing(self, what: str) -> None:
        """Note what the main thread does from now on; raises `Interrupted` where the work is to end."""

    def add_progress(self, size_bytes: int) -> None:
        """Count bytes that are done; any thread may call it."""

    def progress(self, total_bytes: int, what: str) -> AbstractContextManager[None]:
        """Show the progress of all ranks until the block ends."""

    def say(self, event: str, text: str, **details: Any) -> None:
        """Tell the user, on rank 0: an event's kind, its text for people, and JSON values for programs."""

    def run_on(self, ranks: Sequence[int], name: str, work: Callable[[], object], timeout_seconds: float) -> None:
        """Do something on some ranks, however long it takes; all return when it is done on each of them.

        Args:
            ranks: that do it. The others wait, outside of any collective.
            name: of the work, once in a run.
            work: what these ranks do. Where it fails, all end as with any failure.
            timeout_seconds: how long such a rank may show no sign of life.

        Raises:
            LostRank: a rank is silent for longer.
        """


class Embedded:
    """A `Control` without threads or a store; it says nothing, as a report holds all of it.

    Args:
        world: this rank.
        on_progress: is called with the bytes that this rank has done, and those of the whole work, from any thread.
        cancel: is asked between two steps whether to end.
    """

    def __init__(
        self,
        world: World,
        on_progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        self._world = world
        self._on_progress = on_progress
        self._cancel = cancel
        self._lock = threading.Lock()
        self._done_bytes = self._total_bytes = 0

    def doing(self, what: str) -> None:
        if self._cancel is not None and self._cancel():
            raise Cancelled

    def add_progress(self, size_bytes: int) -> None:
        with self._lock:
            self._done_bytes += size_bytes
            if self._on_progress is not None:
                self._on_progress(self._done_bytes, self._total_bytes)

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[None]:
        self._done_bytes, self._total_bytes = 0, total_bytes
        yield

    def say(self, event: str, text: str, **details: Any) -> None:
        """Nothing."""

    def run_on(self, ranks: Sequence[int], name: str, work: Callable[[], object], timeout_seconds: float) -> None:
        if self._world.rank in ranks:
            work()
        barrier(self._world)  # which decides how long it may take
