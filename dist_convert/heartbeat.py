"""Which rank no longer moves: every rank posts a beat a second with what it does, and one that looks on compares."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from dist_convert.errors import lost_contact
from dist_convert.failures import Store

BEAT_SECONDS = 1.0
#: How often the store is asked whether work is done: often at first, as most of it is short.
_FIRST_POLL_SECONDS, _POLL_SECONDS = 0.005, 0.3
#: What a rank does alone; in anything else it may wait for others as long as they take.
_ALONE = ("reading step", "writing step")


@dataclass(frozen=True)
class Beat:
    """What a rank last said: how often it has, on which machine it is, and what its main thread does.

    `is_silent` where it has not said anything for a while.
    """

    rank: int
    count: int
    host: str
    doing: str
    is_silent: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, last heard of while {self.doing}"


@dataclass
class Watchdog:
    """Remembers since when each rank has said the same.

    Attributes:
        patience_seconds: how long it may.
    """

    patience_seconds: float
    _heard: dict[int, tuple[int, float]] = field(default_factory=dict)
    _seen_doing: dict[int, tuple[str, float]] = field(default_factory=dict)

    def look(self, beats: Iterable[Beat], now_seconds: float) -> list[Beat]:
        """The ranks that have been silent, or in the same step, for longer than they may."""
        found = []
        for beat in beats:
            count, since = self._heard.get(beat.rank, (-1, now_seconds))
            if count != beat.count:
                since = now_seconds
            self._heard[beat.rank] = (beat.count, since)
            doing, doing_since = self._seen_doing.get(beat.rank, ("", now_seconds))
            if doing != beat.doing:
                doing_since = now_seconds
            self._seen_doing[beat.rank] = (beat.doing, doing_since)
            is_stuck = beat.doing.startswith(_ALONE) and now_seconds - doing_since > self.patience_seconds
            if is_stuck or now_seconds - since > self.patience_seconds:
                found.append(beat)
        return found


def suspects(before: Sequence[Beat], after: Sequence[Beat]) -> list[Beat]:
    """Who keeps the others waiting: the ranks that were silent between two looks, else those that wait for nobody."""
    counts = {beat.rank: beat.count for beat in before}
    silent = [replace(beat, is_silent=True) for beat in after if counts.get(beat.rank) == beat.count]
    return silent or [beat for beat in after if beat.doing.startswith(_ALONE)]


class Pulse:
    """One rank's beats in the store, and its view of the others'.

    Args:
        rank, size: of the world.
        patience_seconds: see `Watchdog`.
    """

    def __init__(self, rank: int, size: int, patience_seconds: float) -> None:
        self._rank = rank
        self._keys = [f"beat/{rank}" for rank in range(size)]
        self._count = 0
        self._beat_at = 0.0
        self._watchdog = Watchdog(patience_seconds)

    def beat(self, store: Store, lock: threading.Lock, doing: str) -> list[Beat]:
        """Beat, if it is time; rank 0 learns which ranks have not moved for too long."""
        now = time.monotonic()
        if now < self._beat_at + BEAT_SECONDS:
            return []
        self._beat_at, self._count = now, self._count + 1
        with lock:
            store.set(self._keys[self._rank], json.dumps([self._rank, self._count, socket.gethostname(), doing]))
        return [] if self._rank else self._watchdog.look(self.heard(store, lock), now)

    def heard(self, store: Store, lock: threading.Lock) -> list[Beat]:
        """Every rank's last beat; none before all have given one."""
        with lock:
            texts = store.multi_get(self._keys) if store.check(self._keys) else []
        return [Beat(*json.loads(text)) for text in texts]

    def suspects(self, store: Store, lock: threading.Lock) -> list[Beat]:
        """Who keeps the others waiting, or is gone; it takes some seconds to find out."""
        before = self.heard(store, lock)
        time.sleep(2.5 * BEAT_SECONDS)
        return suspects(before, self.heard(store, lock))


def wait_for_work(
    ranks: Sequence[int],
    name: str,
    timeout_seconds: float,
    is_set: Callable[[str], bool],
    count_of: Callable[[str], int],
) -> None:
    """Wait until work of some ranks is done, as long as they give signs of life.

    Args:
        ranks: that work.
        name: of the work: a rank's keys in the store are `NAME/RANK/done`, and `NAME/RANK/alive`, which it counts up.
        timeout_seconds: how long a rank may show no sign of life.
        is_set, count_of: of a key.

    Raises:
        LostRank: a rank is silent for longer.
    """
    asked, pause_seconds = time.monotonic(), _FIRST_POLL_SECONDS
    signs = dict.fromkeys(ranks, (0, asked))
    while not all(is_set(f"{name}/{rank}/done") for rank in ranks):
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _POLL_SECONDS)
        now = time.monotonic()
        if now - asked < timeout_seconds / 4:
            continue
        asked = now
        for rank, (count, heard) in signs.items():
            latest = count_of(f"{name}/{rank}/alive")
            signs[rank] = (latest, now if latest > count else heard)
            if now - signs[rank][1] > timeout_seconds and not is_set(f"{name}/{rank}/done"):
                raise lost_contact(f"no sign of life from rank {rank} in {timeout_seconds:g} s ({name})")
