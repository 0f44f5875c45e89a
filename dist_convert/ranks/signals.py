"""SIGTERM and SIGINT as events that a thread can wait for, even while the main thread is inside a collective."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

_CAUGHT = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it the signals end this process with one line, while there is nothing to be left in order.

    Not by KeyboardInterrupt: inside an import it is swallowed, or becomes a page of frames.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, _end) for number in _heeded()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stopped_by(number: int) -> int:
    """Say once for all ranks which signal ends them; the exit code."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the terminal or pipe may be gone before us
            os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    return 128 + number


def _end(number: int, _frame: object) -> None:
    os._exit(stopped_by(number))


def _heeded() -> list[int]:
    return [number for number in _CAUGHT if signal.getsignal(number) != signal.SIG_IGN]  # nohup's are not


class Signals:
    """Signals that have arrived and were not asked for yet."""

    def __init__(self) -> None:
        self._received, self._sent = socket.socketpair()
        self._received.setblocking(False)
        self._sent.setblocking(False)
        self._noted: int | None = None

    @property
    def noted(self) -> int | None:
        """The first signal that the main thread has noticed, however often it asks; no other thread does."""
        return self._noted

    def take(self) -> int | None:
        """The number of a signal that has arrived, if one has; several of them count as the first."""
        try:
            numbers = self._received.recv(4096)
        except OSError:  # none has arrived, or none is waited for any more
            return None
        return next((number for number in numbers if number in _CAUGHT), None)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Within it the signals only arrive here, however often. Outside the main thread nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self._note) for number in _heeded()}
        # The interpreter's own handler writes the number at once; the one above waits for the main thread.
        wakeup = signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self._received.close()
            self._sent.close()

    def _note(self, number: int, _frame: object) -> None:
        self._noted = self._noted or number
