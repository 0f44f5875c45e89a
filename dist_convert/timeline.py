"""Where a rank's time goes: seconds by phase for the final report, and every stretch of it for whoever traces."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: What is timed. A reader thread reads, the main thread gathers and waits for the others, a writer thread places and
#: writes; so the seconds of all phases together exceed those that have passed.
PHASES = ("read", "gather", "place", "write", "wait")


@dataclass(frozen=True)
class Stretch:
    """A stretch of one thread's time, in seconds of `time.perf_counter`.

    Attributes:
        phase: one of `PHASES`.
        subject: the tensor or step that it was spent on.
        size_bytes: that were read, received, placed or written; 0 where that means nothing.
    """

    phase: str
    subject: str
    start_seconds: float
    end_seconds: float
    size_bytes: int


def _heard_by_nobody(stretch: Stretch) -> None:
    """For a timeline that only adds up."""


@dataclass(frozen=True)
class Timeline:
    """Adds up what each phase takes, and tells every stretch to who listens.

    Attributes:
        on_stretch: called from the thread whose time it was.
    """

    on_stretch: Callable[[Stretch], None] = _heard_by_nobody
    _spent: dict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def during(self, phase: str, subject: str, size_bytes: int = 0) -> Iterator[None]:
        """Count what the block takes, unless it fails."""
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self._spent[phase, threading.get_ident()] += end - start  # a key for each thread: none waits for another
        self.on_stretch(Stretch(phase, subject, start, end, size_bytes))

    def seconds(self) -> dict[str, float]:
        """What each phase has taken, over all threads."""
        return {phase: sum(s for (of, _), s in self._spent.items() if of == phase) for phase in PHASES}
