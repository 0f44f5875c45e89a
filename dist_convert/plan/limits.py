"""How large each rank's buffers are, and who reads what within a group: both follow from the budget and the shards."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_convert.plan.copies import BLOCK_BYTES, Transfer
from dist_convert.plan.gather_groups import GatherGroup

#: Of what one rank reads in a step. It holds any one block, with room to align the pieces of a thousand shards. Larger
#: steps do not pay: what was read is written while the processor's cache has it.
STEP_BYTES = BLOCK_BYTES + (64 << 10)

#: Where ranks gather, each reads one step, has read one, and writes one. Over gloo one more is on its way between them.
_SLOTS = 3

#: Besides a step: scratch for reading, casts of one block, and rows put side by side.
_WORK_BYTES = 5 * BLOCK_BYTES

#: Threads that do whole steps, at most: so many requests of one rank keep a disk across a network busy.
MOST_THREADS = 4

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
        threads: that do whole steps at the same time, where nothing is gathered.
    """

    send_bytes: int
    members: int
    on_accelerator: bool = False
    threads: int = 1

    @property
    def slots(self) -> int:
        """How many steps a rank has in hand, at most."""
        return _SLOTS + (not self.on_accelerator) if self.received_bytes else self.threads

    @property
    def received_bytes(self) -> int:
        return self.send_bytes * self.members if self.members > 1 else 0

    @property
    def total_bytes(self) -> int:
        """All that the data path allocates: slots, what is worked with, and staging."""
        slot_bytes, staging_bytes = [STEP_BYTES, self.received_bytes], 0
        if self.on_accelerator and self.members > 1:
            slot_bytes = [_pinned_bytes(size_bytes) for size_bytes in slot_bytes]
            staging_bytes = self.send_bytes + self.received_bytes
        return self.slots * sum(slot_bytes) + self.threads * _WORK_BYTES + staging_bytes


def _pinned_bytes(size_bytes: int) -> int:
    """What torch takes for a pinned buffer: the next power of two (c10's CachingHostAllocator)."""
    return 1 << (size_bytes - 1).bit_length() if size_bytes else 0


def limits(budget_bytes: int, least: Limits) -> Limits:
    """The most useful buffers within a rank's budget, which holds the least that one block needs."""
    if not least.send_bytes:
        return replace(least, threads=max(1, min(MOST_THREADS, budget_bytes // least.total_bytes)))
    sizes = range(least.send_bytes, STEP_BYTES + 1, ALIGNMENT_BYTES)
    fitting = bisect_right(
        sizes, budget_bytes, key=lambda size_bytes: replace(least, send_bytes=size_bytes).total_bytes
    )
    return replace(least, send_bytes=sizes[fitting - 1]) if fitting else least


def largest_send_bytes(
    transfers: Sequence[Transfer],
    group: GatherGroup,
    visible: Sequence[frozenset[str]],
    writable: Sequence[frozenset[str]],
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


def readers_of(transfer: Transfer, group: GatherGroup, visible: Sequence[frozenset[str]]) -> list[tuple[int, ...]]:
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
