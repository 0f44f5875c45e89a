"""A store for ranks that are forked, in a process of its own.

Served in the process that forks them, its thread might hold a lock at that moment, which a rank would wait for forever.
"""

from __future__ import annotations

import ctypes
import os
import signal

from torch.distributed import TCPStore

_PR_SET_PDEATHSIG = 1  # prctl(2)


def fork_store() -> tuple[int, int]:
    """Serve a store; returns its process, which ends with this one at the latest, and its port."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as port:
            return child, int(port.readline())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writing, f"{store.port}\n".encode())
    while True:
        signal.pause()


def end_store(process: int) -> None:
    """End what `fork_store` started."""
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
