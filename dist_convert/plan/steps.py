"""What each rank does, step by step: what it reads, what crosses to other ranks, and what it writes.

A block that one rank both reads and writes stays there. A block whose pieces lie with several ranks (a weight cut along
its columns), or whose targets do, crosses in a gather step, in which every member of the group takes part. All members
derive the same gather steps in the same order; what each moves alone comes in between, in an order of its own.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dist_convert.errors import BudgetTooSmall
from dist_convert.plan.copies import bands, blocks_of_band, part_of
from dist_convert.plan.gather_groups import ByteRange
from dist_convert.plan.plan import STEP_BYTES, Limits, Plan, aligned, readers_of
from dist_convert.records import DTYPE_BYTES, Block, Copy, FilesOfRanks, Message, View, Window, in_turn, side_by_side


@dataclass(frozen=True)
class Read:
    """A window of a source file that one member reads, casts and packs row by row into its buffer.

    Attributes:
        source: what is read.
        dtype: safetensors name of the packed values.
        add: added to each value before the cast.
        reader: position in the group.
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
class ReadColumns:
    """Some columns of a packed read: number of the read in its step, first column, columns."""

    read: int
    column: int
    columns: int


@dataclass(frozen=True)
class Write:
    """A window of a target file that one member writes: the parts side by side, or their rows in turn."""

    target: View
    parts: tuple[ReadColumns, ...]
    writer: int

    @property
    def turns(self) -> int:
        """How many parts' rows take turns; 1 where they lie side by side."""
        return sum(part.columns for part in self.parts) // self.target.columns


@dataclass(frozen=True)
class Step:
    """Reads and writes done together: of one block, then of as many as the buffers hold.

    `send_bytes` is what each member sends to the gather; 0 where nothing crosses.
    """

    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    send_bytes: int = 0


def steps_of(plan: Plan, rank: int) -> Iterator[Step]:
    """What a rank does, in order, expanded while it is iterated; a BudgetTooSmall where a single block does not fit."""
    number, member = plan.group_of(rank)
    local = _Packer(STEP_BYTES, crosses=False)
    crossing = _Packer(plan.limits[number].send_bytes, crosses=True)
    for block in blocks_of_member(plan, number, member):
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
            parts = tuple(ReadColumns(first + part.read, part.column, part.columns) for part in write.parts)
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
        last = found[-1] if found else Message(-1, -1, 0, 0)
        if (last.sender, last.receiver, last.offset_bytes + last.size_bytes) == (sender, receiver, offset_bytes):
            found[-1] = replace(last, size_bytes=last.size_bytes + size_bytes)
        else:
            found.append(Message(sender, receiver, offset_bytes, size_bytes))
    return found


def received_bytes(step: Step, passed: Sequence[Message], member: int, limit: Limits) -> int:
    """What a member receives in a step with such messages: of an accelerator all that is sent, over gloo its share."""
    if limit.on_accelerator:
        return step.send_bytes * limit.members
    return sum(message.size_bytes for message in passed if message.receiver == member)


def blocks_of_member(plan: Plan, number: int, member: int) -> Iterator[Step]:
    """The blocks that a member of a group moves alone, between those of the whole group.

    What crosses comes in the same order for all members, and each does about an equal part of its own in between, so
    that none waits long for another. `number` is the group's, `member` a position in its ranks.
    """
    group = plan.groups[number]
    own = blocks_alone(plan, number, member)
    own_bytes, group_bytes = (sum(one.size_bytes for one in ranges) for ranges in (group.alone[member], group.together))
    own_passed_bytes = group_passed_bytes = 0
    for block in blocks_of_group(plan, number):
        while own_passed_bytes * group_bytes < group_passed_bytes * own_bytes and (mine := next(own, None)):
            own_passed_bytes += _size_bytes(mine)
            yield mine
        group_passed_bytes += _size_bytes(block)
        yield block
    yield from own


def _size_bytes(block: Step) -> int:
    """What ranges are counted in: a block's bytes in the target's dtype, once however often they are written."""
    return sum(read.size_bytes for read in block.reads)


def blocks_alone(plan: Plan, number: int, member: int) -> Iterator[Step]:
    """The blocks that one member of a group both reads and writes, without what earlier runs have written.

    They begin elsewhere for each member: a file takes the writes of one at a time. Not with the first, which is where
    what crosses begins.
    """
    group = plan.groups[number]
    seen = plan.visible[group.ranks[member]]
    writable = [plan.writable[rank] for rank in group.ranks]
    ranges, members = group.alone[member], len(group.ranks)
    begun_bytes = sum(one.size_bytes for one in ranges) * (member + 1) // (members + 1) if members > 1 else 0
    for byte_range in _rotated(ranges, begun_bytes):
        for block in _blocks_in_range(plan, byte_range):
            sources = [(member, _seen_by(copy, seen)) for copy in block]
            yield from _left(plan, _joined(block, sources, writable, [0] * members))


def _rotated(ranges: Sequence[ByteRange], begun_bytes: int) -> Iterator[ByteRange]:
    """The ranges from so many bytes on, those before at the end; one may be cut for it."""
    for number, byte_range in enumerate(ranges):
        if byte_range.size_bytes > begun_bytes:
            cut = byte_range.first_byte + begun_bytes
            yield replace(byte_range, first_byte=cut)
            yield from ranges[number + 1 :]
            yield from ranges[:number]
            yield replace(byte_range, end_byte=cut)
            return
        begun_bytes -= byte_range.size_bytes


def blocks_of_group(plan: Plan, number: int) -> Iterator[Step]:
    """What the members of a group move together, in the order of the plan, without what earlier runs have written.

    Each copy is read by the member that has read least of those that own its piece of the source, and written by that
    which has written least of those that reach the file.
    """
    group = plan.groups[number]
    seen, writable = ([of[rank] for rank in group.ranks] for of in (plan.visible, plan.writable))
    transfers = plan.content.transfers

    def written_of(byte_range: ByteRange) -> int:  # about, counting every equal target
        transfer = transfers[byte_range.transfer]
        return byte_range.size_bytes * transfer.written_bytes // transfer.size_bytes

    written_bytes = [sum(map(written_of, ranges)) for ranges in group.alone]
    # Apart for each number of copies that are written, so that who reads as much as others also writes as much.
    read_bytes: dict[int, list[int]] = defaultdict(lambda: [0] * len(seen))
    for byte_range in group.together:
        transfer = transfers[byte_range.transfer]
        readers = dict(zip(transfer.source_files, readers_of(transfer, group, plan.visible), strict=True))
        for block in _blocks_in_range(plan, byte_range):
            read_of_kind = read_bytes[len(block[0].targets)]
            sources = []
            for copy in block:
                reader, *others = readers[tuple(view.file for view in copy.sources)]
                if others:
                    strangers = [sum(target.file not in files for target in copy.targets) for files in writable]
                    reader = min((reader, *others), key=lambda member: (strangers[member], read_of_kind[member]))
                sources.append((reader, _seen_by(copy, seen[reader])))
            for assigned in _left(plan, _joined(block, sources, writable, written_bytes)):
                for read in assigned.reads:
                    read_of_kind[read.reader] += read.source.size_bytes
                for write in assigned.writes:
                    written_bytes[write.writer] += write.target.size_bytes
                yield assigned


def _blocks_in_range(plan: Plan, byte_range: ByteRange) -> Iterator[Block]:
    """The blocks that begin in a range."""
    transfer = plan.content.transfers[byte_range.transfer]
    files = frozenset(transfer.target_files)
    end = 0
    for band in bands(plan.content.ends, transfer.names):
        start, end = end, end + _target_bytes(part_of(band, files))
        if byte_range.first_byte < end and start < byte_range.end_byte:
            for block in blocks_of_band(band, files):
                if byte_range.first_byte <= start < byte_range.end_byte:
                    yield block
                start += _target_bytes(block)


def _target_bytes(block: Block) -> int:
    """What a byte_range's first and last byte are counted in."""
    return sum(copy.targets[0].size_bytes for copy in block)


def _seen_by(copy: Copy, files: frozenset[str]) -> View:
    """The first of the equal sources that lies in some files."""
    return next(view for view in copy.sources if view.file in files)


def _left(plan: Plan, block: Step) -> Iterator[Step]:
    """A block without the writes that are finished, if any are left."""
    if plan.written.size_bytes:
        block = replace(
            block, writes=tuple(one for one in block.writes if not plan.written.covers(Window.of(one.target)))
        )
    if block.writes:
        yield block


def _joined(
    block: Block, sources: Sequence[tuple[int, View]], writable: FilesOfRanks, written_bytes: Sequence[int]
) -> Step:
    """A block's copies, each from its reader and source; what lies side by side is joined into one read or write.

    The only reader writes what it can reach, else the member that can and has written least.
    """
    reads: list[Read] = []
    targets = []
    parts: list[list[ReadColumns]] = []
    open_writes: list[int] = []
    whole = in_turn([view for copy in block for view in copy.targets])  # one target of each of two copies
    for copy, (reader, source) in zip(block, sources, strict=True):
        joined = side_by_side(reads[-1].source, source) if reads and reads[-1].reader == reader else None
        column = reads[-1].source.columns if joined else 0
        if joined:
            reads[-1] = replace(reads[-1], source=joined)
        else:
            reads.append(Read(source, copy.targets[0].dtype, copy.add, reader))
        part = ReadColumns(len(reads) - 1, column, copy.columns)
        if whole:
            targets, parts = [whole], [[*(parts[0] if parts else ()), part]]
            continue
        for number, target in enumerate(copy.targets):
            longer = side_by_side(targets[open_writes[number]], target) if number < len(open_writes) else None
            if longer:
                targets[open_writes[number]] = longer
                parts[open_writes[number]].append(part)
            else:
                open_writes[number : number + 1] = [len(targets)]
                targets.append(target)
                parts.append([part])
    writers = []
    for target in targets:
        able = [member for member, files in enumerate(writable) if target.file in files]
        (reader, *others) = {read.reader for read in reads}
        alone = not others and reader in able
        writers.append(reader if alone else min(able, key=lambda member: written_bytes[member]))
    return Step(tuple(reads), tuple(map(Write, targets, map(tuple, parts), writers)))
