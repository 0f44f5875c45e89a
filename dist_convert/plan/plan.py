"""Which rank does what: a content divided over ranks, without what earlier runs have written, and their buffers.

Pure: integers and strings, no torch, no files, no process groups. Every rank makes the same plan from the same
headers; one digest of it is compared before any byte moves.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

from dist_convert.errors import BudgetTooSmall, UsageError
from dist_convert.plan.content import Content, digest
from dist_convert.plan.copies import BLOCK_BYTES, Ends, Transfer
from dist_convert.plan.gather_groups import GatherGroup, form_gather_groups
from dist_convert.records import FilesOfRanks, Window, __version__, counted, human_bytes

#: Of what one rank reads in a step. It holds any one block, with room to align the pieces of a thousand shards. Larger
#: steps do not pay: what was read is written while the processor's cache has it.
STEP_BYTES = BLOCK_BYTES + (64 << 10)

#: Where ranks gather, each reads one step, has read one, and writes one. Over gloo one more is on its way between them.
_SLOTS = 3

#: Of a thread: a step that needs no other rank, scratch for reading, casts of one block, and rows put side by side.
_THREAD_BYTES = STEP_BYTES + 5 * BLOCK_BYTES

#: Threads of a rank, at most: so many requests of one rank keep a disk across a network busy.
MOST_THREADS = 4

#: Threads of a rank that gathers: one reads while one writes.
_GATHER_THREADS = 2

#: Pieces begin at multiples of this in buffers, so that every dtype is aligned.
ALIGNMENT_BYTES = 64


def aligned(size_bytes: int) -> int:
    """Up to where the next piece may begin."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True)
class Limits:
    """Sizes of one rank's buffers, in bytes.

    Attributes:
        send_bytes: of what each member sends to a gather.
        members: of the group.
        on_accelerator: gathers go through an accelerator's memory, from and to pinned memory of the host.
        threads: that do steps at the same time.
    """

    send_bytes: int
    members: int
    on_accelerator: bool = False
    threads: int = 1

    @property
    def slots(self) -> int:
        """How many steps that are gathered a rank has in hand, at most."""
        return _SLOTS + (not self.on_accelerator) if self.received_bytes else 0

    @property
    def received_bytes(self) -> int:
        return self.send_bytes * self.members if self.members > 1 else 0

    @property
    def total_bytes(self) -> int:
        """All that the data path allocates: slots, what is worked with, and staging."""
        slot_bytes, staging_bytes = [STEP_BYTES, self.received_bytes], 0
        if self.on_accelerator and self.members > 1:
            # Of a pinned buffer torch takes the next power of two (c10's CachingHostAllocator).
            slot_bytes = [1 << (size - 1).bit_length() if size else 0 for size in slot_bytes]
            staging_bytes = self.send_bytes + self.received_bytes
        return self.slots * sum(slot_bytes) + self.threads * _THREAD_BYTES + staging_bytes


def limits(budget_bytes: int, least: Limits) -> Limits:
    """The most useful buffers within a rank's budget, which holds the least that one block needs."""
    if least.send_bytes:
        sizes = range(least.send_bytes, STEP_BYTES + 1, ALIGNMENT_BYTES)
        fitting = bisect_right(sizes, budget_bytes, key=lambda one: replace(least, send_bytes=one).total_bytes)
        least = replace(least, send_bytes=sizes[fitting - 1]) if fitting else least
    spare_bytes = max(0, budget_bytes - least.total_bytes)
    most = _GATHER_THREADS if least.send_bytes else MOST_THREADS
    return replace(least, threads=min(most, 1 + spare_bytes // _THREAD_BYTES))


def largest_send_bytes(
    transfers: Sequence[Transfer], group: GatherGroup, visible: FilesOfRanks, writable: FilesOfRanks
) -> int:
    """The most that one member may contribute to the gather of a single block; 0 where no block crosses members."""
    if len(group.ranks) == 1:
        return 0
    written_by_all = frozenset.intersection(*(writable[rank] for rank in group.ranks))
    largest_bytes = 0
    shared = [transfers[one.transfer] for one in group.together]
    for transfer in {(one.source_files, one.target_files, one.stretches): one for one in shared}.values():
        readers = readers_of(transfer, group, visible)
        if not written_by_all.issuperset(transfer.target_files):
            largest_bytes = max(largest_bytes, BLOCK_BYTES + len(readers) * ALIGNMENT_BYTES)
        for pieces in {pieces for pieces, _ in transfer.stretches if len(pieces) > 1}:
            count = max(Counter(member for piece in pieces for member in readers[piece]).values(), default=0)
            largest_bytes = max(largest_bytes, BLOCK_BYTES * count // len(pieces) + count * ALIGNMENT_BYTES)
    return aligned(largest_bytes)


def readers_of(transfer: Transfer, group: GatherGroup, visible: FilesOfRanks) -> list[tuple[int, ...]]:
    """For each piece of the source, the members that read it in turn: each member owns as few shards as possible."""
    able = [
        tuple(member for member, rank in enumerate(group.ranks) if not visible[rank].isdisjoint(files))
        for files in transfer.source_files
    ]
    readers = []
    for piece, members in enumerate(able):
        alike = [other for other, others in enumerate(able) if others == members]
        position, count = alike.index(piece), len(alike)
        first = position * len(members) // count
        end = max(first + 1, (position + 1) * len(members) // count)
        readers.append(members[first:end])
    return readers


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
    visible: FilesOfRanks
    writable: FilesOfRanks
    groups: tuple[GatherGroup, ...]
    limits: tuple[Limits, ...]
    written: WrittenRanges = NOTHING_WRITTEN

    def group_of(self, rank: int) -> tuple[int, int]:
        """A rank's group, and its position in it."""
        return next((n, group.ranks.index(rank)) for n, group in enumerate(self.groups) if rank in group.ranks)


def divide(
    content: Content,
    visible: FilesOfRanks,
    *,
    placement: str,
    budget_bytes: int,
    writable: FilesOfRanks | None = None,
    on_accelerator: bool = False,
    written: WrittenRanges = NOTHING_WRITTEN,
) -> Plan:
    """Divide a content over ranks.

    Args:
        content, placement, written: see `Plan`.
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


def _interned(of_ranks: FilesOfRanks) -> FilesOfRanks:
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
        what = "the nodes' own disks hold chunks in an order that ranks on accelerators cannot gather"
        expected = f"groups of at most {counted(pieces, 'rank')}, one for each piece of a weight"
        remedy = "put the checkpoint on a file system that all nodes share, or pass --device cpu"
        raise UsageError(what, expected=expected, found=f"a group of {largest}", remedy=remedy)
