"""What earlier runs of a conversion have written already.

Pure, and about bytes of target files alone: it holds for any number of ranks, either placement and any block size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dist_convert.plan.copies import Ends, Transfer
from dist_convert.records import Window


@dataclass(frozen=True)
class Done:
    """Finished bytes.

    Attributes:
        stretches: by file, first and end byte of disjoint stretches in ascending order.
        gapped: finished windows with gaps, which are found again only as they are.
        size_bytes: of all.
    """

    stretches: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    gapped: frozenset[Window] = frozenset()
    size_bytes: int = 0

    @staticmethod
    def of(windows: Iterable[Window]) -> Done:
        """Join windows, in any order and as often as they come."""
        distinct = frozenset(windows)
        gapped = frozenset(window for window in distinct if window.runs > 1)
        joined: dict[str, list[tuple[int, int]]] = {}
        for window in sorted(distinct - gapped, key=lambda window: window.offset_bytes):
            start, end = window.offset_bytes, window.offset_bytes + window.run_bytes
            known = joined.setdefault(window.file, [])
            if known and start <= known[-1][1]:
                start, last = known.pop()
                end = max(end, last)
            known.append((start, end))
        dense_bytes = sum(end - start for of_file in joined.values() for start, end in of_file)
        return Done(joined, gapped, dense_bytes + sum(window.size_bytes for window in gapped))

    def covers(self, window: Window) -> bool:
        """Whether all bytes of a window are finished."""
        if window.runs > 1:
            return window in self.gapped
        stretches = self.stretches.get(window.file, ())
        before = bisect_right(stretches, window.offset_bytes, key=lambda stretch: stretch[0])
        return before > 0 and stretches[before - 1][1] >= window.offset_bytes + window.run_bytes


NOTHING_DONE = Done()


def is_transfer_done(ends: Ends, transfer: Transfer, done: Done) -> bool:
    """Whether nothing of a transfer is left to do; False also where only its single blocks can tell."""
    if not done.size_bytes:
        return False
    regions = [region for name in transfer.names for region in ends.target.regions(name)]
    if ends.repeat_last_row:
        regions += [region for name in transfer.names for region in ends.target.padding(name)]
    views = [view for region in regions for view in region.replicas if view.file in transfer.target_files]
    return all(not view.is_scattered and done.covers(Window.of(view)) for view in views)
