"""How large each rank's buffers are, and who reads what within a team: both follow from the budget and the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_convert.plan.copies import BLOCK_BYTES, Transfer
from dist_convert.plan.teams import Team

#: Of what one rank reads in a step. It holds any one block, with room to align the pieces of a thousand shards. Larger
#: steps do not pay: what was read is written while the processor's cache has it.
STEP_BYTES = BLOCK_BYTES + (64 << 10)

#: A rank reads one step, has read one, and writes one. Over gloo one more is on its way between ranks meanwhile.
_SLOTS = 3

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
        members: of the team.
        on_accelerator: gathers go through an accelerator's memory, from and to pinned memory of the host.
    """

    send_bytes: int
    members: int
    on_accelerator: bool = False

    @property
    def slots(self) -> int:
        """How many steps a rank has in hand, at most."""
        return _SLOTS + (self.received_bytes > 0 and not self.on_accelerator)

    @property
    def received_bytes(self) -> int:
        return self.send_bytes * self.members if self.members > 1 else 0

    @property
    def staging_bytes(self) -> int:
        """The accelerator's memory that a gather passes through."""
        return (self.send_bytes + self.received_bytes) * self._is_staged

    @property
    def total_bytes(self) -> int:
        """All that the data path allocates: slots, scratch for reading and casting, the writer's rows, and staging."""
        slot_bytes = [STEP_BYTES, self.received_bytes]
        if self._is_staged:
            slot_bytes = [_pinned_bytes(size_bytes) for size_bytes in slot_bytes]
        return self.slots * sum(slot_bytes) + 5 * BLOCK_BYTES + self.staging_bytes

    @property
    def _is_staged(self) -> bool:
        return self.on_accelerator and self.members > 1


def _pinned_bytes(size_bytes: int) -> int:
    """What torch takes for a pinned buffer: the next power of two (c10's CachingHostAllocator)."""
    return 1 << (size_bytes - 1).bit_length() if size_bytes else 0


def limits(budget_bytes: int, least: Limits) -> Limits:
    """The largest useful buffers within a rank's budget, which holds the least that one block needs."""
    buffers = (least.slots + least.on_accelerator) * least.members
    left_bytes = (budget_bytes - least.total_bytes) // buffers
    affordable_bytes = least.send_bytes + left_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    send_bytes = max(least.send_bytes, min(affordable_bytes, STEP_BYTES)) if least.send_bytes else 0
    found = replace(least, send_bytes=send_bytes)
    while found.total_bytes > budget_bytes and found.send_bytes > least.send_bytes:
        # An accelerator's staging takes more, and its pinned memory goes in steps of two.
        half_bytes = found.send_bytes // 2 // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        found = replace(found, send_bytes=max(least.send_bytes, half_bytes))
    return found


def largest_send_bytes(transfers: Sequence[Transfer], team: Team, visible: Sequence[frozenset[str]]) -> int:
    """The most that one member may contribute to the gather of a single block; 0 where no block crosses members."""
    if len(team.ranks) == 1:
        return 0
    reached_by_all = frozenset.intersection(*(visible[rank] for rank in team.ranks))
    largest_bytes = 0
    shared = [transfers[share.transfer] for share in team.shares]
    for transfer in {(transfer.all_needs, transfer.crosses): transfer for transfer in shared}.values():
        readers = readers_of(transfer, team, visible)
        pieces = max(Counter(member for members in readers for member in members).values())
        if not reached_by_all.issuperset(transfer.target_files):
            largest_bytes = max(largest_bytes, BLOCK_BYTES + len(readers) * ALIGNMENT_BYTES)
        elif transfer.crosses and len(readers) > 1:
            largest_bytes = max(largest_bytes, BLOCK_BYTES * pieces // len(readers) + pieces * ALIGNMENT_BYTES)
    return aligned(largest_bytes)


def able_readers(transfer: Transfer, team: Team, visible: Sequence[frozenset[str]]) -> list[tuple[int, ...]]:
    """For each piece of a transfer's source, the members that see it."""
    return [
        tuple(member for member, rank in enumerate(team.ranks) if not visible[rank].isdisjoint(files))
        for files in transfer.source_files
    ]


def readers_of(transfer: Transfer, team: Team, visible: Sequence[frozenset[str]]) -> list[tuple[int, ...]]:
    """For each piece of the source, the members that read it in turn: each member owns as few shards as possible."""
    eligible = able_readers(transfer, team, visible)
    readers = []
    for shard, members in enumerate(eligible):
        alike = [other for other, others in enumerate(eligible) if others == members]
        position, count = alike.index(shard), len(alike)
        first = position * len(members) // count
        end = max(first + 1, (position + 1) * len(members) // count)
        readers.append(members[first:end])
    return readers
