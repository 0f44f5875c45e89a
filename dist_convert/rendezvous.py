"""The store that torchrun or rank 0 serves, and how to reach it."""

from __future__ import annotations

import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore


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
