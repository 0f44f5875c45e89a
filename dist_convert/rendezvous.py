"""The store that torchrun, this program's first process or rank 0 serves, and how to reach it."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore


def is_served_by_launcher() -> bool:
    """Whether what has started the ranks serves the store, so that it outlives any of them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect() -> Store:
    """A connection of our own to the store where the ranks meet; each restart has its own keys."""
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )
    return _with_prefix(store)


def serve(meeting: socket.socket) -> Store:
    """Serve the store for ranks of this machine, on a socket that listens already and becomes the store's own."""
    address, port = meeting.getsockname()
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=meeting.detach())
    return _with_prefix(store)


def _with_prefix(store: Store) -> Store:
    return PrefixStore(f"dist_convert/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
