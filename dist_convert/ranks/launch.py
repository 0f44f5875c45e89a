"""Ranks of one machine without torchrun: one process imports torch, forks them, and serves the store where they meet.

It moves no bytes itself. What ranks find in their environment is what torchrun would tell them.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from dist_convert.errors import RESUME, ConversionError, LostRank
from dist_convert.ranks.channel import Failures, serve_store
from dist_convert.ranks.signals import CAUGHT, handled_by

#: From the end of a rank that failed until the others, which should have ended by themselves, are killed.
_GRACE_SECONDS = 20.0
#: The exit code of a rank that met an error before it could tell the others.
_CRASHED = 70
#: A parameter of prctl(2).
_PR_SET_PDEATHSIG = 1


def run_ranks(count: int, run: Callable[[], int]) -> int:
    """Run a function on every rank, wait for all of them, and return the exit code of the first that failed, or 0.

    Signals go on to the ranks. One that is killed ends the others, and is named; one that does not end after a failure
    is killed. Nothing may have started a thread before.

    Raises:
        ConversionError: the system does not allow so many processes.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=max(count, 128)) as meeting:
        context = multiprocessing.get_context("fork")
        launcher = os.getpid()
        given = [(rank, count, meeting, launcher, run) for rank in range(count)]
        processes = [context.Process(target=_be_rank, args=args) for args in given]
        try:
            with _forwarding(processes) as forwarded:
                failures = Failures(serve_store(meeting))
                exit_code = _wait(processes, failures, forwarded)
                if (posted := failures.read()) and not failures.is_printed():
                    print(posted["message"], file=sys.stderr)  # who posted it was killed before it could
                return exit_code
        except BaseException:
            _kill(processes)  # Python would wait for them at exit
            raise


def _be_rank(rank: int, count: int, meeting: socket.socket, launcher: int, run: Callable[[], int]) -> None:
    address, port = meeting.getsockname()
    meeting.close()
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) | {"GROUP_RANK": "0"}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever this machine's name resolves to
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGTERM)  # it was gone before it could be asked for
    try:
        exit_code = run()
    except Exception:
        traceback.print_exc()
        exit_code = _CRASHED
    sys.exit(exit_code)


@contextlib.contextmanager
def _forwarding(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Start processes, and pass on to them the signals that come here; gives the list of those."""
    forwarded = []

    def forward(number: int, _frame: object) -> None:
        forwarded.append(number)
        for process in processes:
            if process.exitcode is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    with contextlib.ExitStack() as stack:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)  # none may come between a fork and its handler
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how ranks end
        try:
            for process in processes:
                process.start()
            stack.enter_context(handled_by(forward))
        except OSError as error:
            what = f"rank {sum(process.pid is not None for process in processes)} cannot be started"
            remedy = "start fewer ranks, or allow more processes (ulimit -u)"
            raise ConversionError(what, found=error.strerror or error, remedy=remedy) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield forwarded


def _wait(processes: Sequence[BaseProcess], failures: Failures, forwarded: Sequence[int]) -> int:
    exit_code, deadline_seconds = 0, math.inf
    running = dict(enumerate(processes))
    while running:
        left_seconds = None if deadline_seconds == math.inf else max(0.0, deadline_seconds - time.monotonic())
        wait([process.sentinel for process in running.values()], left_seconds)
        for rank, process in list(running.items()):
            code = process.exitcode
            if code is None:
                continue
            del running[rank]
            # The signal that has ended it, or that it heeded before it could tell the others.
            number = -code if code < 0 else max(0, code - 128)
            is_lost = code == _CRASHED or (number and number not in forwarded)
            if is_lost and failures.read() is None:
                _tell(rank, number, failures)
            if code < 0:
                code = 128 + number if number in forwarded else LostRank.exit_code
            exit_code = exit_code or (LostRank.exit_code if code == _CRASHED else code)
            if code and failures.read() is not None:  # of `verify` a difference is no failure
                deadline_seconds = min(deadline_seconds, time.monotonic() + _GRACE_SECONDS)
        if running and time.monotonic() > deadline_seconds:
            names = ", ".join(map(str, running))
            print(f"killed rank {names}: still running {_GRACE_SECONDS:g} s after a failure", file=sys.stderr)
            _kill(list(running.values()))
    return exit_code


def _tell(rank: int, number: int, failures: Failures) -> None:
    """Tell the user and the other ranks of one that a signal has ended, or an error that it did not expect."""
    names = {known.value: known.name for known in signal.Signals}
    how = f"was ended by {names.get(number, f'signal {number}')}" if number else "has crashed"
    remedy = "if memory was short (see dmesg), start fewer ranks or lower --max-memory-per-rank"
    error = LostRank(f"rank {rank} {how}", remedy=remedy if number == signal.SIGKILL else "")
    error.resume = RESUME
    if failures.post(str(error), error.exit_code):
        failures.print_once()


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None:
            process.kill()
            process.join()
