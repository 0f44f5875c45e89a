"""What each rank does, step by step: what it reads, what crosses to other ranks, and what it writes.

A block that one rank both reads and writes stays there. A block whose pieces lie with several ranks (a weight cut along
its columns), or whose targets do, crosses in a gather step, in which every member of the team takes part. All members
derive the same gather steps in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dist_convert.errors import BudgetTooSmall
from dist_convert.plan.deal import Share
from dist_convert.plan.done import Done
from dist_convert.plan.limits import ALIGNMENT_BYTES, Limits, able_readers, readers_of
from dist_convert.plan.moves import Move, Sides, blocks
from dist_convert.plan.teams import Team
from dist_convert.records import DTYPE_BYTES, Block, View, Window, side_by_side


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
    """Reads and writes done together. `send_bytes` is what each member sends to the gather; 0 where nothing crosses."""

    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    send_bytes: int


def steps_of_rank(
    sides: Sides,
    moves: Sequence[Move],
    team: Team,
    member: int,
    visible: Sequence[frozenset[str]],
    limit: Limits,
    done: Done,
) -> Iterator[Step]:
    """The steps of one member of a team, in order.

    Args:
        sides, moves: the plan.
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
    for block in assigned_blocks(sides, moves, team, visible, done):
        readers = {read.reader for read in block.reads}
        if readers == {write.writer for write in block.writes} and len(readers) == 1:
            if readers == {member}:
                yield from local.add(block)
        else:
            yield from crossing.add(block)
    yield from crossing.flush()
    yield from local.flush()


@dataclass(frozen=True)
class Assigned:
    """The reads and writes of one block; offsets are given when it is packed."""

    reads: tuple[Read, ...]
    writes: tuple[Write, ...]


def assigned_blocks(
    sides: Sides, moves: Sequence[Move], team: Team, visible: Sequence[frozenset[str]], done: Done
) -> Iterator[Assigned]:
    """The team's blocks with the replica that is read, and the members that read and write; without what is done."""
    seen = [visible[rank] for rank in team.ranks]
    written_bytes = [0] * len(seen)
    # Apart for each number of copies that are written, so that who reads as much as others also writes as much.
    read_bytes: dict[int, list[int]] = defaultdict(lambda: [0] * len(seen))
    readers_in_turn = able_readers if sides.to_megatron else readers_of  # a Hugging Face file is nobody's own
    for share in team.shares:
        move = moves[share.move]
        readers = dict(zip(move.homes, readers_in_turn(move, team, visible), strict=True))
        for block in _blocks_of_share(sides, move, share):
            read_of_kind = read_bytes[len(block[0].targets)]
            assigned = _assign(block, readers, seen, read_of_kind, written_bytes)
            if done.size_bytes:
                left = tuple(write for write in assigned.writes if not done.covers(Window.of(write.target)))
                if not left:
                    continue
                assigned = replace(assigned, writes=left)
            for read in assigned.reads:
                read_of_kind[read.reader] += read.source.size_bytes
            for write in assigned.writes:
                written_bytes[write.writer] += write.target.size_bytes
            yield assigned


def _blocks_of_share(sides: Sides, move: Move, share: Share) -> Iterator[Block]:
    start = 0
    for block in blocks(sides, move):
        if start >= share.end_byte:
            return
        if start >= share.first_byte:
            yield block
        start += sum(copy.targets[0].size_bytes for copy in block)


def _assign(
    block: Block,
    readers: dict[tuple[str, ...], tuple[int, ...]],
    seen: Sequence[frozenset[str]],
    read_bytes: Sequence[int],
    written_bytes: Sequence[int],
) -> Assigned:
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
        source = next(view for view in copy.sources if view.file in seen[reader])
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
    return Assigned(tuple(reads), tuple(map(Write, targets, map(tuple, parts), writers)))


def _writer(target: View, alone: int | None, seen: Sequence[frozenset[str]], written_bytes: Sequence[int]) -> int:
    """The only reader where it can reach the target's file, else the member that can and has written least."""
    if alone is not None and target.file in seen[alone]:
        return alone
    able = [member for member, files in enumerate(seen) if target.file in files]
    return min(able, key=lambda member: written_bytes[member])


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
