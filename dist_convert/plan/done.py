"""What earlier runs of a conversion have written already.

Pure, and about bytes of target files alone: it holds for any number of ranks, either placement and any block size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dist_convert.plan.copies import Ends, Transfer
from dist_convert.records import Window


@dataclass(frozen=True)
class Done:
    """Finished bytes.

    Attributes:
        starts, ends: by file, the borders of disjoint stretches in ascending order.
        gapped: finished windows with gaps, which are found again only as they are.
        size_bytes: of all.
    """

    starts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ends: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    gapped: frozenset[Window] = frozenset()
    size_bytes: int = 0

    @staticmethod
    def of(windows: Iterable[Window]) -> Done:
        """Join windows, in any order and as often as they come."""
        dense: dict[str, list[tuple[int, int]]] = {}
        gapped = set()
        for window in windows:
            if window.runs == 1:
                stretch = (window.offset_bytes, window.offset_bytes + window.run_bytes)
                dense.setdefault(window.file, []).append(stretch)
            else:
                gapped.add(window)
        starts: dict[str, tuple[int, ...]] = {}
        ends: dict[str, tuple[int, ...]] = {}
        for file, stretches in dense.items():
            joined: list[list[int]] = []
            for start, end in sorted(stretches):
                if joined and start <= joined[-1][1]:
                    joined[-1][1] = max(joined[-1][1], end)
                else:
                    joined.append([start, end])
            starts[file], ends[file] = tuple(s for s, _ in joined), tuple(e for _, e in joined)
        size_bytes = sum(window.size_bytes for window in gapped)
        size_bytes += sum(sum(ends[file]) - sum(starts[file]) for file in starts)
        return Done(starts, ends, frozenset(gapped), size_bytes)

    def covers(self, window: Window) -> bool:
        """Whether all bytes of a window are finished."""
        if window.runs > 1:
            return window in self.gapped
        starts = self.starts.get(window.file, ())
        before = bisect_right(starts, window.offset_bytes)
        return before > 0 and self.ends[window.file][before - 1] >= window.offset_bytes + window.run_bytes


NOTHING_DONE = Done()


def is_transfer_done(ends: Ends, transfer: Transfer, done: Done) -> bool:
    """Whether nothing of a transfer is left to do; False also where only its single blocks can tell."""
    if not done.size_bytes:
        return False
    regions = [region for name in transfer.names for region in ends.target.regions(name)]
    if ends.repeat_last_row:
        regions += [region for name in transfer.names for region in ends.target.padding(name)]
    views = [view for region in regions for view in region.replicas if view.file in transfer.target_files]
    return all(done.covers(Window.of(view)) for view in views)
