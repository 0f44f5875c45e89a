"""SIGTERM and SIGINT: answered at once, or noted for any thread, even while the main one is inside a collective."""

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from dist_convert.errors import UsageError

CAUGHT = (signal.SIGTERM, signal.SIGINT)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Within it a function of ours handles the signals. Outside the main thread nothing is changed."""
    before = {}
    try:
        for number in CAUGHT:
            if _is_main_thread() and signal.getsignal(number) != signal.SIG_IGN:  # nohup's are not heeded
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for caught, known in before.items():
            signal.signal(caught, known)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it the signals end this process with one line, while there is nothing to be left in order.

    Not by KeyboardInterrupt: inside an import it is swallowed, or becomes a page of frames.
    """
    with handled_by(lambda number, _: os._exit(stopped_by(number))):
        yield


def is_first_rank() -> bool:
    """Whether this process speaks for all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are, by the environment; a UsageError where that cannot be."""
    usual = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    told = {name: os.environ.get(name, value) for name, value in usual.items()}
    for name, text in told.items():
        if not re.fullmatch("[0-9]{1,9}", text) or (name.endswith("SIZE") and int(text) == 0):
            raise UsageError(f"{name} is not a number of ranks", found=repr(text[:40]), remedy=_LAUNCH)
    rank, size = int(told["RANK"]), int(told["WORLD_SIZE"])
    if rank >= size:
        raise UsageError("RANK is not below WORLD_SIZE", found=f"RANK={rank}, WORLD_SIZE={size}", remedy=_LAUNCH)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        found = f"no {' and no '.join(missing)}, beside WORLD_SIZE={size}"
        raise UsageError("the address where the ranks meet is not set", found=found, remedy=_LAUNCH)
    port = os.environ.get("MASTER_PORT", "1")
    if size > 1 and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 1 << 16):
        raise UsageError("MASTER_PORT is not a port", found=repr(port[:40]), remedy=_LAUNCH)
    try:
        if size > 1:  # else nobody asks for it, and the codec is large where memory is short
            os.environ["MASTER_ADDR"].encode("idna")
    except UnicodeError as error:
        raise UsageError("MASTER_ADDR is not the name of a machine", found=error, remedy=_LAUNCH) from error
    for name in _PRINTED_BY_TORCH if size > 1 else ():
        if not (value := os.environ.get(name, "")).isprintable():
            raise UsageError(f"{name} has unreadable characters", found=repr(value[:40]), remedy=_LAUNCH)
    return rank, size


def node_number() -> str | None:
    """The number of this process's node, as a launcher tells it; None where none does."""
    rank, local_size = os.environ.get("RANK"), os.environ.get("LOCAL_WORLD_SIZE")
    worked_out = str(int(rank) // int(local_size)) if rank is not None and local_size is not None else None
    return os.environ.get("GROUP_RANK", worked_out)


#: Of which torch says, as they are, that ranks cannot meet there.
_PRINTED_BY_TORCH = ("MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCHELASTIC_RESTART_COUNT")
_LAUNCH = "start with torchrun or --ranks, or unset what a launcher has left: RANK, WORLD_SIZE, LOCAL_WORLD_SIZE"


def stopped_by(number: int) -> int:
    """Say once for all ranks which signal ends them; the exit code."""
    if is_first_rank():
        with contextlib.suppress(OSError):  # the terminal or pipe may be gone before us
            os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    return 128 + number


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], int | None]]:
    """Within it the signals are only noted: what it gives tells the number of one that has come, from any thread.

    Several that have come since it was asked count as the first. Outside the main thread none is noted.
    """
    received, sent = socket.socketpair()
    received.setblocking(False)
    sent.setblocking(False)

    def take() -> int | None:
        try:
            numbers = received.recv(4096)
        except OSError:  # none has come, or none is waited for any more
            return None
        return next((number for number in numbers if number in CAUGHT), None)

    with received, sent:
        if not _is_main_thread():
            yield take
            return
        # The interpreter's own handler writes the number at once; the one below waits for the main thread.
        wakeup = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
        try:
            with handled_by(lambda _number, _frame: None):
                yield take
        finally:
            signal.set_wakeup_fd(wakeup)
