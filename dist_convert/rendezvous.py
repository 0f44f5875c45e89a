"""The store that torchrun or rank 0 serves: how to reach it, and how not to wait for it for ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

Answer = TypeVar("Answer")


def within(seconds: float, work: Callable[[], Answer]) -> Answer | None:
    """What a function returns, None where that takes longer: calls to a store behind a cut network never return."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(work()), daemon=True)
    thread.start()
    thread.join(timeout=seconds)
    return answers[0] if answers else None


def is_served_by_launcher() -> bool:
    """Whether torchrun itself serves the store, so that it outlives any rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect() -> Store:
    """A connection of our own to the store that torchrun (or rank 0) serves; each restart has its own keys."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )
    return PrefixStore(f"dist_convert/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
