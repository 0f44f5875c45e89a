"""What a command says while it works: text for people, or JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dist_convert.records import human_bytes, human_seconds


@dataclass(frozen=True)
class Log:
    """Notes and progress on standard error; a plan as text goes to standard output.

    Attributes:
        is_json: an object a line, each with an "event" and the time.
        interval_seconds: between two lines of progress. On a terminal people see a bar instead.
    """

    is_json: bool = False
    interval_seconds: float = 30.0

    def say(self, event: str, text: str, **details: Any) -> None:
        """See `Channel.say`."""
        line = as_json_line(event, text, **details) if self.is_json else text
        print(line, file=sys.stdout if event == "plan" and not self.is_json else sys.stderr, flush=True)

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[Callable[[int], object]]:
        """Show how far work is while the block lasts; what it gives is called now and then with the bytes done."""
        if self.is_json or not sys.stderr.isatty():
            yield self._lines(total_bytes, what)
            return
        from tqdm import tqdm  # only here: most runs have no terminal

        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, dynamic_ncols=True) as bar:
            yield lambda done_bytes: bar.update(done_bytes - bar.n)

    def _lines(self, total_bytes: int, what: str) -> Callable[[int], None]:
        started = shown = time.monotonic()

        def update(done_bytes: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= self.interval_seconds:
                shown = now
                text = what if self.is_json else _share_done(done_bytes, total_bytes, now - started)
                self.say("progress", text, done_bytes=done_bytes, total_bytes=total_bytes)

        return update


def _share_done(done_bytes: int, total_bytes: int, seconds: float) -> str:
    rate = done_bytes / seconds
    left = f", {human_seconds((total_bytes - done_bytes) / rate)} left" if rate else ""
    share = 100 * done_bytes // max(1, total_bytes)
    amounts = f"{human_bytes(done_bytes)} of {human_bytes(total_bytes)}, {human_bytes(rate)}/s"
    return f"{time.strftime('%H:%M:%S')}  {share:3}%  {amounts}{left}"


def as_json_line(event: str, text: str, **details: Any) -> str:
    """One event as a JSON object."""
    return json.dumps({"event": event, "time": round(time.time(), 3), "text": text, **details}, default=str)
