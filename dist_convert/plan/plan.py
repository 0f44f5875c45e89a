"""Which rank does what: a content divided over ranks, without what earlier runs have written.

Pure: integers and strings, no torch, no files, no process groups. Every rank makes the same plan from the same
headers; one digest of it is compared before any byte moves.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field

from dist_convert.errors import BudgetTooSmall, UsageError
from dist_convert.plan.content import Content, digest
from dist_convert.plan.copies import Ends, Transfer
from dist_convert.plan.gather_groups import GatherGroup, form_gather_groups
from dist_convert.plan.limits import Limits, largest_send_bytes, limits
from dist_convert.records import Window, __version__, counted, human_bytes


@dataclass(frozen=True)
class WrittenRanges:
    """Finished bytes: they hold for any number of ranks, either placement and any block size.

    Attributes:
        stretches: by file, first and end byte of disjoint stretches in ascending order.
        gapped: finished windows with gaps, which are found again only as they are.
        size_bytes: of all.
    """

    stretches: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    gapped: frozenset[Window] = frozenset()
    size_bytes: int = 0

    @staticmethod
    def of(windows: Iterable[Window]) -> "WrittenRanges":
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
        return WrittenRanges(joined, gapped, dense_bytes + sum(window.size_bytes for window in gapped))

    def covers(self, window: Window) -> bool:
        """Whether all bytes of a window are finished."""
        if window.runs > 1:
            return window in self.gapped
        stretches = self.stretches.get(window.file, ())
        before = bisect_right(stretches, window.offset_bytes, key=lambda stretch: stretch[0])
        return before > 0 and stretches[before - 1][1] >= window.offset_bytes + window.run_bytes


NOTHING_WRITTEN = WrittenRanges()


def is_transfer_written(ends: Ends, transfer: Transfer, written: WrittenRanges) -> bool:
    """Whether nothing of a transfer is left to do; False also where only its single blocks can tell."""
    if not written.size_bytes:
        return False
    regions = [region for name in transfer.names for region in ends.target.regions(name)]
    if ends.repeat_last_row:
        regions += [region for name in transfer.names for region in ends.target.padding(name)]
    views = [view for region in regions for view in region.replicas if view.file in transfer.target_files]
    return all(not view.is_scattered and written.covers(Window.of(view)) for view in views)


@dataclass(frozen=True)
class Plan:
    """A content, and its division over ranks.

    Attributes:
        content: what is converted.
        placement: "gather" or "direct".
        visible: for each rank, the source files that it can read.
        writable: for each rank, the target files that it can write, which may have the names of source files.
        groups: disjoint groups of ranks, with what each moves.
        limits: for each group, its members' buffer sizes.
        written: what an earlier run has written, and is left out.
    """

    content: Content
    placement: str
    visible: tuple[frozenset[str], ...]
    writable: tuple[frozenset[str], ...]
    groups: tuple[GatherGroup, ...]
    limits: tuple[Limits, ...]
    written: WrittenRanges = NOTHING_WRITTEN

    def group_of(self, rank: int) -> tuple[int, int]:
        """A rank's group, and its position in it."""
        return next((n, group.ranks.index(rank)) for n, group in enumerate(self.groups) if rank in group.ranks)


def divide(
    content: Content,
    visible: Sequence[frozenset[str]],
    *,
    placement: str,
    budget_bytes: int,
    writable: Sequence[frozenset[str]] | None = None,
    on_accelerator: bool = False,
    written: WrittenRanges = NOTHING_WRITTEN,
) -> Plan:
    """Divide a content over ranks.

    Args:
        content, placement, written: see `Plan`.
        visible: for each rank, the source files that it can read.
        budget_bytes: of memory, for each rank.
        writable: for each rank, the target files that it can write; None where the target is shared.
        on_accelerator: the ranks gather through an accelerator's memory, which the budget holds as well.

    Raises:
        BudgetTooSmall: naming the least that all groups can work with.
        UsageError, MissingShard: see `form_gather_groups`.
    """
    visible = _interned(visible)
    writable = _interned(writable or [frozenset(file.name for file in content.files)] * len(visible))
    listed = enumerate(content.transfers)
    finished = frozenset(number for number, transfer in listed if is_transfer_written(content.ends, transfer, written))
    groups = form_gather_groups(content.transfers, visible, writable, placement, finished)
    least = [
        Limits(largest_send_bytes(content.transfers, group, visible, writable), len(group.ranks), on_accelerator)
        for group in groups
    ]
    least_bytes = max(limit.total_bytes for limit in least)
    if budget_bytes < least_bytes:
        raise BudgetTooSmall(
            "the memory budget does not hold one step",
            expected=f"--max-memory-per-rank of at least {-(-least_bytes // 1_000_000)}MB",
            found=human_bytes(budget_bytes),
            remedy="raise --max-memory-per-rank"
            + (", or use --placement direct where every rank sees all files" if placement == "gather" else ""),
        )
    return Plan(
        content, placement, visible, writable, groups, tuple(limits(budget_bytes, one) for one in least), written
    )


def _interned(of_ranks: Sequence[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """One object for equal sets, which are then compared in no time."""
    alike = dict(zip(of_ranks, of_ranks, strict=True))
    return tuple(alike[files] for files in of_ranks)


def schedule_digest(plan: Plan) -> str:
    """Names who does what in one run; the ranks of the run compare it.

    The version stands for how groups' ranges become steps.
    """
    return digest(
        {
            "version": __version__,
            "content": plan.content.digest,
            "placement": plan.placement,
            "groups": repr(plan.groups),
            "limits": repr(plan.limits),
            "written": [plan.written.stretches, sorted(map(astuple, plan.written.gapped))],
        }
    )


def check_groups(plan: Plan) -> None:
    """Refuse to gather by more ranks than a weight has pieces, as an accelerator would bring each rank what all read.

    Raises:
        UsageError: with the largest group.
    """
    pieces = max(len(found) for transfer in plan.content.transfers for found, _ in transfer.stretches)
    largest = max(len(group.ranks) for group in plan.groups)
    if largest > pieces:
        raise UsageError(
            "the nodes' own disks hold chunks in an order that ranks on accelerators cannot gather",
            expected=f"groups of at most {counted(pieces, 'rank')}, as a weight has so many pieces",
            found=f"a group of {largest}",
            remedy="put the checkpoint on a file system that all nodes share, or pass --device cpu",
        )
