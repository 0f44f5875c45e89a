"""Who hears what a command has to say: a terminal, a log, a program that called a function."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from dist_convert.records import human_bytes, human_seconds


class Listener(Protocol):
    """Hears events, on rank 0 alone."""

    def say(self, event: str, text: str, **details: Any) -> None:
        """Something that the user should know.

        Args:
            event: its kind, "note" or "done".
            text: for people.
            details: for programs, JSON values.
        """

    def progress(self, total_bytes: int, what: str) -> AbstractContextManager[Callable[[int], None]]:
        """Show how far work is while the block lasts; what it gives is called now and then with the bytes done."""


@dataclass(frozen=True)
class TextLog:
    """Text on standard error: a bar on a terminal, elsewhere a line every so many seconds. Plans go to standard output.

    Attributes:
        interval_seconds: between two lines of progress.
    """

    interval_seconds: float = 30.0

    def say(self, event: str, text: str, **details: Any) -> None:
        """See `Listener`."""
        print(text, file=sys.stdout if event == "plan" else sys.stderr, flush=True)

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[Callable[[int], None]]:
        """See `Listener`."""
        if not sys.stderr.isatty():
            yield _now_and_then(self.interval_seconds, lambda done, seconds: self._line(done, total_bytes, seconds))
            return
        from tqdm import tqdm  # only here: most runs have no terminal

        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, dynamic_ncols=True) as bar:

            def update(done_bytes: int) -> None:
                bar.update(done_bytes - bar.n)

            yield update

    def _line(self, done_bytes: int, total_bytes: int, seconds: float) -> None:
        rate = done_bytes / seconds
        left = f", {human_seconds((total_bytes - done_bytes) / rate)} left" if rate else ""
        share = 100 * done_bytes // max(1, total_bytes)
        amounts = f"{human_bytes(done_bytes)} of {human_bytes(total_bytes)}, {human_bytes(rate)}/s"
        print(f"{time.strftime('%H:%M:%S')}  {share:3}%  {amounts}{left}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class JsonLog:
    """A JSON object a line on standard error, each with an "event" and the time.

    Attributes:
        interval_seconds: between two lines of progress.
    """

    interval_seconds: float = 30.0

    def say(self, event: str, text: str, **details: Any) -> None:
        """See `Listener`."""
        print(as_json_line(event, text, **details), file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[Callable[[int], None]]:
        """See `Listener`."""

        def line(done_bytes: int, _seconds: float) -> None:
            self.say("progress", what, done_bytes=done_bytes, total_bytes=total_bytes)

        yield _now_and_then(self.interval_seconds, line)


def as_json_line(event: str, text: str, **details: Any) -> str:
    """One event as a JSON object."""
    return json.dumps({"event": event, "time": round(time.time(), 3), "text": text, **details}, default=str)


def _now_and_then(interval_seconds: float, show: Callable[[int, float], None]) -> Callable[[int], None]:
    started = shown = time.monotonic()

    def update(done_bytes: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= interval_seconds:
            shown = now
            show(done_bytes, now - started)

    return update


@dataclass(frozen=True)
class Collector:
    """Says nothing, as a report holds all of it, and passes progress on to a function of the caller's.

    Attributes:
        on_progress: is called with bytes done and bytes in all, from any thread.
    """

    on_progress: Callable[[int, int], None] | None = None

    def say(self, event: str, text: str, **details: Any) -> None:
        """See `Listener`."""

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[Callable[[int], None]]:
        """See `Listener`."""

        def update(done_bytes: int) -> None:
            if self.on_progress is not None:
                self.on_progress(done_bytes, total_bytes)

        yield update
