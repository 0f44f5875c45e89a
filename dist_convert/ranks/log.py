"""What a command says while it works: text for people, or JSON for programs."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dist_convert.errors import shown_line
from dist_convert.records import human_bytes, human_seconds


class Log:
    """Notes and progress on standard error; a plan, and a report in JSON, go to standard output.

    Args:
        is_json: an object a line, each with an "event" and the time.
        interval_seconds: between two lines of progress. On a terminal people see a bar instead.
        is_quiet: only warnings, and what is asked for on standard output.
        reports_json: a report is printed as JSON on standard output.
    """

    def __init__(
        self, is_json: bool = False, interval_seconds: float = 30, is_quiet: bool = False, reports_json: bool = False
    ) -> None:
        self._is_json, self._is_quiet, self._reports_json = is_json, is_quiet, reports_json
        self._interval_seconds = interval_seconds
        self._shown_at = self._began_at = time.monotonic()
        self._moving = ""  # what bytes are moved for at this moment
        self._done_bytes = self._total_bytes = 0

    def say(self, event: str, text: str, **details: Any) -> None:
        """See `Channel.say`."""
        if "report" in details and self._reports_json:
            print(json.dumps(details["report"], indent=2), flush=True)
        lines = "\n".join(map(shown_line, text.split("\n")))
        if self._is_json:
            _note(as_json_line(event, text, **details))
        elif event == "plan":
            if not self._reports_json:
                print(lines, flush=True)
        elif not self._is_quiet or text.startswith("warning"):
            _note(lines)

    @contextmanager
    def progress(self, total_bytes: int, what: str) -> Iterator[Callable[[int], object]]:
        """Show how far work is while the block lasts; what it gives is called now and then with the bytes done."""
        if self._has_bar():
            from tqdm import tqdm  # only here: most runs have no terminal

            with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, dynamic_ncols=True) as bar:
                yield lambda done_bytes: bar.update(done_bytes - bar.n)
            return
        self._moving, self._began_at = what, time.monotonic()
        self._done_bytes, self._total_bytes = 0, total_bytes
        yield self._note_done
        self._moving = ""

    def _note_done(self, done_bytes: int) -> None:
        self._done_bytes = done_bytes

    def tick(self, doing: str) -> None:
        """Show a line of progress, or else what is done, if it is time for one; any thread may call it, and often."""
        now = time.monotonic()
        if now - self._shown_at < self._interval_seconds or self._is_quiet or self._has_bar():
            return
        self._shown_at = now
        if not self._moving:
            self.say("doing", doing if self._is_json else f"{time.strftime('%H:%M:%S')}  {doing}")
            return
        done_bytes, total_bytes = self._done_bytes, self._total_bytes
        seconds = now - self._began_at
        text = self._moving if self._is_json else _share_done(self._moving, done_bytes, total_bytes, seconds)
        self.say("progress", text, done_bytes=done_bytes, total_bytes=total_bytes)

    def _has_bar(self) -> bool:
        return not (self._is_json or self._is_quiet) and sys.stderr.isatty()


def _note(text: str) -> None:
    """Write to standard error; where its disk is full, the work goes on without a word."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _share_done(what: str, done_bytes: int, total_bytes: int, seconds: float) -> str:
    rate = done_bytes / max(seconds, 1e-9)
    left = f", {human_seconds((total_bytes - done_bytes) / rate)} left" if rate else ""
    share = 100 * done_bytes // max(1, total_bytes)
    amounts = f"{human_bytes(done_bytes)} of {human_bytes(total_bytes)}, {human_bytes(rate)}/s"
    return f"{time.strftime('%H:%M:%S')}  {what} {share:3}%  {amounts}{left}"


def tell_torchrun(message: str) -> None:
    """Leave a rank's message where torchrun looks for it, so that its own report ends with it."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # A second earlier: before that of ranks that torchrun ends for this one, as it shows the earliest last.
        extra = {"py_callstack": message, "timestamp": str(int(time.time()) - 1)}
        with suppress(OSError):  # torchrun ends the other ranks while they write theirs
            Path(f"{file}.new").write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
            os.replace(f"{file}.new", file)


def as_json_line(event: str, text: str, **details: Any) -> str:
    """One event as a JSON object."""
    return json.dumps({"event": event, "time": round(time.time(), 3), "text": text, **details}, default=str)
