"""The failure of a run, in the store that all ranks reach: the first one that is posted, printed once."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any, Protocol


class Store(Protocol):
    """The part of torch's store that ranks talk through."""

    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def set(self, key: str, value: str, /) -> None: ...


class Failures:
    """A rank's view of the failure.

    Args:
        store: of all ranks.
        lock: held around every use of the store.
    """

    def __init__(self, store: Store, lock: threading.Lock) -> None:
        self._store = store
        self._lock = lock

    def post(self, message: str, exit_code: int, signal_number: int | None = None) -> bool:
        """Post a failure unless another one has been posted; whether it was the first."""
        with self._lock:
            first = self._store.add("failures", 1) == 1
            if first:
                failure = {"message": message, "exit_code": exit_code, "signal": signal_number}
                self._store.set("failure", json.dumps(failure))
        return first

    def read(self) -> dict[str, Any] | None:
        """The failure's message, exit code and signal; None where all is well."""
        with self._lock:
            return json.loads(self._store.get("failure")) if self._store.check(["failure"]) else None

    def is_printed(self) -> bool:
        with self._lock:
            return self._store.check(["printed"])

    def print_once(self) -> None:
        """Print the message, unless another process does; one must have been posted."""
        with self._lock:
            if self._store.add("printers", 1) == 1:
                print(json.loads(self._store.get("failure"))["message"], file=sys.stderr, flush=True)
                self._store.set("printed", "1")
