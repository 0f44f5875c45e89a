"""What each rank does, step by step: what it reads, what crosses to other ranks, and what it writes.

A block that one rank both reads and writes stays there. A block whose pieces lie with several ranks (a weight cut along
its columns), or whose targets do, crosses in a gather step, in which every member of the team takes part. All members
derive the same gather steps in the same order; what each moves alone comes in between, in an order of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dist_convert.errors import BudgetTooSmall
from dist_convert.plan.assign import Assigned, Part, Read, Write, blocks_of_member
from dist_convert.plan.copies import Ends, Transfer
from dist_convert.plan.done import Done
from dist_convert.plan.limits import ALIGNMENT_BYTES, Limits
from dist_convert.plan.teams import Team
from dist_convert.records import Message


@dataclass(frozen=True)
class Step:
    """Reads and writes done together. `send_bytes` is what each member sends to the gather; 0 where nothing crosses."""

    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    send_bytes: int


def steps_of_rank(
    ends: Ends,
    transfers: Sequence[Transfer],
    team: Team,
    member: int,
    visible: Sequence[frozenset[str]],
    limit: Limits,
    done: Done,
) -> Iterator[Step]:
    """The steps of one member of a team, in order.

    Args:
        ends, transfers: the plan.
        team: its ranks and shares.
        member: position in `team.ranks`.
        visible: for each rank of the world, the files that it can read or write.
        limit: buffer sizes, the same for all members.
        done: what need not be written any more.

    Raises:
        BudgetTooSmall: a single block does not fit.
    """
    local = _Packer(limit.step_bytes, crosses=False)
    crossing = _Packer(limit.send_bytes, crosses=True)
    for block in blocks_of_member(ends, transfers, team, visible, done, member):
        readers = {read.reader for read in block.reads}
        if readers == {write.writer for write in block.writes} and len(readers) == 1:
            if readers == {member}:
                yield from local.add(block)
        else:
            yield from crossing.add(block)
    yield from crossing.flush()
    yield from local.flush()


class _Packer:
    """Packs blocks into steps in which no member's share of bytes exceeds a limit."""

    def __init__(self, limit_bytes: int, *, crosses: bool) -> None:
        self._limit_bytes = limit_bytes
        self._crosses = crosses
        self._reads: list[Read] = []
        self._writes: list[Write] = []
        self._filled: dict[int, int] = {}

    def add(self, block: Assigned) -> Iterator[Step]:
        """Take one block in; yield the step before it where the block no longer fits."""
        needed: dict[int, int] = {}
        for read in block.reads:
            needed[read.reader] = needed.get(read.reader, 0) + _aligned(read.size_bytes)
        if max(needed.values()) > self._limit_bytes:
            raise BudgetTooSmall(
                "one block does not fit the buffers that the memory budget leaves",
                tensor=block.reads[0].source.tensor,
                expected=f"{max(needed.values())} bytes for each member of the group",
                found=f"{self._limit_bytes} bytes",
                remedy="raise --max-memory-per-rank",
            )
        if any(self._filled.get(reader, 0) + size > self._limit_bytes for reader, size in needed.items()):
            yield from self.flush()
        first = len(self._reads)
        for read in block.reads:
            offset_bytes = self._filled.get(read.reader, 0)
            self._reads.append(Read(read.source, read.dtype, read.add, read.reader, offset_bytes))
            self._filled[read.reader] = offset_bytes + _aligned(read.size_bytes)
        for write in block.writes:
            parts = tuple(Part(first + part.read, part.column, part.columns) for part in write.parts)
            self._writes.append(Write(write.target, parts, write.writer))

    def flush(self) -> Iterator[Step]:
        """Yield what has been packed since the last step, if anything."""
        if self._reads:
            send_bytes = max(self._filled.values()) if self._crosses else 0
            yield Step(tuple(self._reads), tuple(self._writes), send_bytes)
        self._reads, self._writes, self._filled = [], [], {}


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def bytes_of(step: Step, member: int) -> tuple[int, int]:
    """What one member reads from files and writes to files in a step."""
    read = sum(read.source.size_bytes for read in step.reads if read.reader == member)
    written = sum(write.target.size_bytes for write in step.writes if write.writer == member)
    return read, written


def messages(step: Step) -> list[Message]:
    """All messages of a step, in one order for all members; stretches that touch are one message."""
    if not step.send_bytes:
        return []
    needed = {(step.reads[part.read].reader, write.writer, part.read) for write in step.writes for part in write.parts}
    crossing = ((r, w, step.reads[n].offset_bytes, step.reads[n].size_bytes) for r, w, n in needed if r != w)
    found: list[Message] = []
    for sender, receiver, offset_bytes, size_bytes in sorted(crossing):
        size_bytes = -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES  # up to where the next piece begins
        if found and found[-1].leads_to(sender, receiver, offset_bytes):
            found[-1] = replace(found[-1], size_bytes=found[-1].size_bytes + size_bytes)
        else:
            found.append(Message(sender, receiver, offset_bytes, size_bytes))
    return found


def received_bytes(step: Step, passed: Sequence[Message], member: int, limit: Limits) -> int:
    """What a member receives in a step with such messages: of an accelerator all that is sent, over gloo its share."""
    if limit.on_accelerator:
        return step.send_bytes * limit.members
    return sum(message.size_bytes for message in passed if message.receiver == member)
