"""What each rank does, step by step: what it reads, what crosses to other ranks, and what it writes.

A block that one rank both reads and writes stays there. A block whose pieces lie with several ranks (a weight cut along
its columns), or whose targets do, crosses in a gather step, in which every member of the team takes part. All members
derive the same gather steps in the same order; what each moves alone comes in between, in an order of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dist_convert.errors import BudgetTooSmall
from dist_convert.plan.copies import Transfer, bands, blocks_of_band, part_of
from dist_convert.plan.limits import STEP_BYTES, Limits, able_readers, aligned, readers_of
from dist_convert.plan.plan import Plan
from dist_convert.plan.teams import Share, Team
from dist_convert.records import DTYPE_BYTES, Block, Copy, Message, View, Window, side_by_side

#: The members that may read a piece, by the files that hold equal copies of it.
_Readers = Mapping[tuple[str, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Read:
    """A window of a source file that one member reads, casts and packs row by row into its buffer.

    Attributes:
        source: what is read.
        dtype: safetensors name of the packed values.
        add: added to each value before the cast.
        reader: position in the team.
        offset_bytes: in the reader's buffer.
    """

    source: View
    dtype: str
    add: int
    reader: int
    offset_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        return self.source.rows * self.source.columns * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Part:
    """Some columns of a packed read: number of the read in its step, first column, columns."""

    read: int
    column: int
    columns: int


@dataclass(frozen=True)
class Write:
    """A window of a target file that one member writes: the parts side by side."""

    target: View
    parts: tuple[Part, ...]
    writer: int


@dataclass(frozen=True)
class Step:
    """Reads and writes done together: of one block, then of as many as the buffers hold.

    `send_bytes` is what each member sends to the gather; 0 where nothing crosses.
    """

    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    send_bytes: int = 0


def steps_of(plan: Plan, rank: int) -> Iterator[Step]:
    """What a rank does, in order; expanded while it is iterated.

    Raises:
        BudgetTooSmall: a single block does not fit.
    """
    number, member = plan.place_of(rank)
    local = _Packer(STEP_BYTES, crosses=False)
    crossing = _Packer(plan.limits[number].send_bytes, crosses=True)
    for block in blocks_of_member(plan, plan.teams[number], member):
        readers = {read.reader for read in block.reads}
        if readers != {write.writer for write in block.writes} or len(readers) > 1:
            yield from crossing.add(block)
        elif readers == {member}:
            yield from local.add(block)
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

    def add(self, block: Step) -> Iterator[Step]:
        """Take one block in; yield the step before it where the block no longer fits."""
        needed: dict[int, int] = {}
        for read in block.reads:
            needed[read.reader] = needed.get(read.reader, 0) + aligned(read.size_bytes)
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
            self._filled[read.reader] = offset_bytes + aligned(read.size_bytes)
        for write in block.writes:
            parts = tuple(Part(first + part.read, part.column, part.columns) for part in write.parts)
            self._writes.append(Write(write.target, parts, write.writer))

    def flush(self) -> Iterator[Step]:
        """Yield what has been packed since the last step, if anything."""
        if self._reads:
            send_bytes = max(self._filled.values()) if self._crosses else 0
            yield Step(tuple(self._reads), tuple(self._writes), send_bytes)
        self._reads, self._writes, self._filled = [], [], {}


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
        size_bytes = aligned(size_bytes)  # up to where the next piece begins
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


@dataclass(frozen=True)
class _Band:
    """Copies that are cut together (`copies.bands`), of which a share has some blocks at least.

    Attributes:
        transfer: that they belong to.
        whole: the copies.
        kept: those of them, and of their targets, that the transfer itself has; fewer where it is a part.
        start_byte, end_byte: of the transfer, where they begin and end.
        readers: of the transfer.
        owner: the one member that reads and writes all of them, where that is known whatever has been dealt before.
    """

    transfer: Transfer
    whole: Block
    kept: Block
    start_byte: int
    end_byte: int
    readers: _Readers
    owner: int | None

    def blocks_in(self, share: Share) -> Iterator[Block]:
        """Its blocks that begin in a share."""
        start = self.start_byte
        for block in blocks_of_band(self.transfer, self.whole):
            first, start = start, start + _target_bytes(block)
            if share.first_byte <= first < share.end_byte:
                yield block


def _bands_of_share(plan: Plan, team: Team, share: Share) -> Iterator[_Band]:
    """The bands that a share of a team has blocks of."""
    transfer = plan.content.transfers[share.transfer]
    seen = _seen(plan, team)
    readers = dict(zip(transfer.source_files, _readers_in_turn(plan, transfer, team), strict=True))
    end = 0
    for whole in bands(plan.content.ends, transfer.names):
        kept = part_of(transfer, whole)
        start, end = end, end + _target_bytes(kept)
        if share.first_byte < end and start < share.end_byte:
            yield _Band(transfer, whole, kept, start, end, readers, _owner(kept, readers, seen))


def _seen(plan: Plan, team: Team) -> list[frozenset[str]]:
    return [plan.visible[rank] for rank in team.ranks]


def _readers_in_turn(plan: Plan, transfer: Transfer, team: Team) -> list[tuple[int, ...]]:
    """For each piece of the source, the members that read it in turn: what has no owner, all that see it."""
    return (readers_of if plan.content.ends.source.is_owned else able_readers)(transfer, team, plan.visible)


def _target_bytes(block: Block) -> int:
    """What a share's first and last byte are counted in."""
    return sum(copy.targets[0].size_bytes for copy in block)


def _owner(band: Block, readers: _Readers, seen: Sequence[frozenset[str]]) -> int | None:
    """The one member that reads all of a band, and writes it too, whatever has been dealt before; else None."""
    able = {readers[tuple(view.file for view in copy.sources)] for copy in band}
    if len(able) != 1 or len({len(copy.targets) for copy in band}) != 1:
        return None  # a tile has some of the copies, and is counted by their targets
    (member, *others) = able.pop()
    reaches_all = all(target.file in seen[member] for copy in band for target in copy.targets)
    return member if reaches_all and not others else None


def _seen_by(copy: Copy, files: frozenset[str]) -> View:
    """The first of the equal sources that lies in some files."""
    return next(view for view in copy.sources if view.file in files)


def blocks_of_member(plan: Plan, team: Team, member: int) -> Iterator[Step]:
    """The team's blocks as one member takes them, without what others move alone as far as that is known beforehand.

    What crosses comes in the same order for all members, and each does about an equal part of its own in between, so
    that none waits long for another. Its own begins elsewhere for each: a file takes the writes of one at a time.

    Where an earlier run has done some of it, all members go through all that is left, in the order of the plan.
    `member` is a position in `team.ranks`.
    """
    if len(team.ranks) == 1 or plan.done.size_bytes:
        yield from blocks_of_team(plan, team)
        return
    left: dict[Share, list[_Band]] = {}

    def bands_of(share: Share) -> list[_Band]:
        """Expanded once for the two that go through shares in different orders: who is first leaves it to the other."""
        known = left.pop(share, None)
        if known is None:
            known = left[share] = list(_bands_of_share(plan, team, share))
        return known

    by_share = [_owned_bytes(plan, team, share) for share in team.shares]
    own_by_share = [of_member[member] for of_member in by_share]
    own_bytes = sum(own_by_share)
    # What crosses, and the little that turns out to be one member's only when it is dealt.
    other_bytes = sum(share.end_byte - share.first_byte for share in team.shares) - sum(map(sum, by_share))
    # Not member / members: the first place is where what crosses begins.
    begun_bytes = own_bytes * (member + 1) // (len(team.ranks) + 1)

    seen = _seen(plan, team)
    nobody = [0] * len(seen)  # an owner is alone to be chosen
    own = (
        _assigned(block, band.readers, seen, nobody, nobody)
        for share in _rotated(team.shares, own_by_share, begun_bytes)
        for band in bands_of(share)
        if band.owner == member
        for block in band.blocks_in(share)
    )
    own_passed_bytes = other_passed_bytes = 0
    for block in _dealt(plan, team, bands_of, leave_out_owned=True):
        while own_passed_bytes * other_bytes < other_passed_bytes * own_bytes and (mine := next(own, None)):
            own_passed_bytes += _size_bytes(mine)
            yield mine
        other_passed_bytes += _size_bytes(block)
        yield block
    yield from own


def _size_bytes(block: Step) -> int:
    """What shares are counted in: a block's bytes in the target's dtype, once however often they are written."""
    return sum(read.size_bytes for read in block.reads)


def _rotated(shares: Sequence[Share], own_by_share: Sequence[int], begun_bytes: int) -> Iterator[Share]:
    """The shares from where a member's own bytes are so many, those before at the end; the first may be cut for it."""
    before = 0
    for number, (share, own) in enumerate(zip(shares, own_by_share, strict=True)):
        if before + own > begun_bytes:
            cut = share.first_byte + (share.end_byte - share.first_byte) * (begun_bytes - before) // own
            yield replace(share, first_byte=cut)
            yield from shares[number + 1 :]
            yield from shares[:number]
            yield replace(share, end_byte=cut)
            return
        before += own
    yield from shares


def _owned_bytes(plan: Plan, team: Team, share: Share) -> list[int]:
    """About what each member moves alone of a share. It paces: where it is wrong, some comes early or late.

    Nothing is expanded for it. What lies in several files without owners is not told apart: where members see different
    ones, their own comes last.
    """
    transfer = plan.content.transfers[share.transfer]
    owned = [0] * len(team.ranks)
    readers = _readers_in_turn(plan, transfer, team)
    if transfer.crosses or (not plan.content.ends.source.is_owned and len(set(readers)) > 1):
        return owned
    first = 0
    for piece, end in transfer.stretches:
        members = readers[piece]
        if len(members) == 1 and plan.visible[team.ranks[members[0]]].issuperset(transfer.target_files):
            owned[members[0]] += max(0, min(end, share.end_byte) - max(first, share.first_byte))
        first = end
    return owned


def blocks_of_team(plan: Plan, team: Team) -> Iterator[Step]:
    """All blocks of a team that are not done, in the order of the plan."""
    return _dealt(plan, team, lambda share: _bands_of_share(plan, team, share), leave_out_owned=False)


def _dealt(
    plan: Plan, team: Team, bands_of: Callable[[Share], Iterable[_Band]], *, leave_out_owned: bool
) -> Iterator[Step]:
    """The team's blocks with the replica that is read, and the members that read and write; without what is done.

    Blocks of bands that have an owner can be left out; they are counted for the owner.
    """
    seen = _seen(plan, team)
    written_bytes = [0] * len(seen)
    # Apart for each number of copies that are written, so that who reads as much as others also writes as much.
    read_bytes: dict[int, list[int]] = defaultdict(lambda: [0] * len(seen))
    for share in team.shares:
        for band in bands_of(share):
            if band.owner is not None and leave_out_owned:
                is_all = share.first_byte <= band.start_byte and band.end_byte <= share.end_byte
                for block in (band.kept,) if is_all else band.blocks_in(share):
                    own_bytes = sum(_seen_by(copy, seen[band.owner]).size_bytes for copy in block)
                    read_bytes[len(band.kept[0].targets)][band.owner] += own_bytes
                    written_bytes[band.owner] += sum(target.size_bytes for copy in block for target in copy.targets)
                continue
            for block in band.blocks_in(share):
                read_of_kind = read_bytes[len(block[0].targets)]
                assigned = _assigned(block, band.readers, seen, read_of_kind, written_bytes)
                if plan.done.size_bytes:
                    left = tuple(one for one in assigned.writes if not plan.done.covers(Window.of(one.target)))
                    if not left:
                        continue
                    assigned = replace(assigned, writes=left)
                for read in assigned.reads:
                    read_of_kind[read.reader] += read.source.size_bytes
                for write in assigned.writes:
                    written_bytes[write.writer] += write.target.size_bytes
                yield assigned


def _assigned(
    block: Block,
    readers: _Readers,
    seen: Sequence[frozenset[str]],
    read_bytes: Sequence[int],
    written_bytes: Sequence[int],
) -> Step:
    """Give each copy to the member that has done least; join what lies side by side into one read or write."""
    reads: list[Read] = []
    targets: list[View] = []
    parts: list[list[Part]] = []
    open_writes: list[int] = []
    for copy in block:
        reader, *others = readers[tuple(view.file for view in copy.sources)]
        if others:
            strangers = [sum(target.file not in files for target in copy.targets) for files in seen]
            reader = min((reader, *others), key=lambda member: (strangers[member], read_bytes[member]))
        source = _seen_by(copy, seen[reader])
        joined = side_by_side(reads[-1].source, source) if reads and reads[-1].reader == reader else None
        column = reads[-1].source.columns if joined else 0
        if joined:
            reads[-1] = replace(reads[-1], source=joined)
        else:
            reads.append(Read(source, copy.targets[0].dtype, copy.add, reader))
        part = Part(len(reads) - 1, column, copy.columns)
        for number, target in enumerate(copy.targets):
            longer = side_by_side(targets[open_writes[number]], target) if number < len(open_writes) else None
            if longer:
                targets[open_writes[number]] = longer
                parts[open_writes[number]].append(part)
            else:
                open_writes[number : number + 1] = [len(targets)]
                targets.append(target)
                parts.append([part])
    alone = reads[0].reader if len({read.reader for read in reads}) == 1 else None
    writers = [_writer(target, alone, seen, written_bytes) for target in targets]
    return Step(tuple(reads), tuple(map(Write, targets, map(tuple, parts), writers)))


def _writer(target: View, alone: int | None, seen: Sequence[frozenset[str]], written_bytes: Sequence[int]) -> int:
    """The only reader where it can reach the target's file, else the member that can and has written least."""
    if alone is not None and target.file in seen[alone]:
        return alone
    able = [member for member, files in enumerate(seen) if target.file in files]
    return min(able, key=lambda member: written_bytes[member])
