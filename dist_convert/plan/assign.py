"""Which member of a team reads, and which writes, each block of the team's shares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heapreplace
from itertools import pairwise

from dist_convert.plan.deal import Share, stretches
from dist_convert.plan.done import Done
from dist_convert.plan.limits import able_readers, readers_of
from dist_convert.plan.moves import Move, Sides, blocks
from dist_convert.plan.teams import Team
from dist_convert.records import DTYPE_BYTES, Block, View, Window, side_by_side

#: The members that read each piece of a move's source, by the files that hold it.
_Readers = dict[tuple[str, ...], tuple[int, ...]]

#: Of its part of the bytes, how much more than others a member may have written, for the sake of its own stretch.
_LEAD = 1 / 128


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
class Assigned:
    """The reads and writes of one block; offsets are given when it is packed."""

    reads: tuple[Read, ...]
    writes: tuple[Write, ...]

    @property
    def crosses(self) -> bool:
        """Whether some member writes what another has read."""
        return len({read.reader for read in self.reads} | {write.writer for write in self.writes}) > 1


def assigned_blocks(
    sides: Sides, moves: Sequence[Move], team: Team, visible: Sequence[frozenset[str]], done: Done
) -> Iterator[Assigned]:
    """The team's blocks with the replica that is read, and the members that read and write; without what is done.

    Ranks that write to one file at the same time wait for each other in its file system. So blocks come from as many
    stretches of the shares as there are members, in turn, and what crosses of a stretch is its own member's to write.
    """
    seen = [visible[rank] for rank in team.ranks]
    lead_bytes = int(_LEAD * sum(share.end_byte - share.first_byte for share in team.shares) / len(seen))
    # Apart for each number of copies that are written, so that who reads as much as others also writes as much.
    read_bytes: dict[int, list[int]] = defaultdict(lambda: [0] * len(seen))
    in_turn = able_readers if sides.to_megatron else readers_of  # a Hugging Face file is nobody's own

    def readers_of_move(move: Move) -> _Readers:
        return dict(zip(move.homes, in_turn(move, team, visible), strict=True))

    def blocks_of(shares: Sequence[Share]) -> Iterator[tuple[_Readers, Block]]:
        for share in shares:
            readers = readers_of_move(moves[share.move])
            yield from ((readers, block) for block in _blocks_of_share(sides, moves[share.move], share))

    # What stays is counted from the start, wherever it comes, so that what crosses makes up for it.
    written_bytes = [0] * len(seen)
    for share in team.shares:
        for member, size_bytes in _staying(moves[share.move], share, readers_of_move(moves[share.move])):
            written_bytes[member] += size_bytes
    for own_member, (readers, block) in _in_turn([blocks_of(shares) for shares in _stretches(team)]):
        read_of_kind = read_bytes[len(block[0].targets)]
        busy_bytes = [size - lead_bytes * (member == own_member) for member, size in enumerate(written_bytes)]
        assigned = _assign(block, readers, seen, read_of_kind, busy_bytes)
        if done.size_bytes:
            left = tuple(write for write in assigned.writes if not done.covers(Window.of(write.target)))
            if not left:
                continue
            assigned = replace(assigned, writes=left)
        for read in assigned.reads:
            read_of_kind[read.reader] += read.source.size_bytes
        if assigned.crosses:
            for write in assigned.writes:
                written_bytes[write.writer] += write.target.size_bytes
        yield assigned


def _staying(move: Move, share: Share, readers: _Readers) -> Iterator[tuple[int, int]]:
    """About how many bytes of a share each member both reads and writes."""
    if move.parameter.row.split == "columns" and len(set(readers.values())) > 1:
        return
    borders = [move.size_bytes * piece // len(move.homes) for piece in range(len(move.homes) + 1)]
    for files, (first, end) in zip(move.homes, pairwise(borders), strict=True):
        size_bytes = max(0, min(share.end_byte, end) - max(share.first_byte, first))
        yield from ((member, size_bytes // len(readers[files])) for member in readers[files])


def _stretches(team: Team) -> list[list[Share]]:
    """The team's shares as equally long stretches, one for each member."""
    found: list[list[Share]] = [[] for _ in team.ranks]
    for member, share in stretches(team.shares, [1] * len(team.ranks)):
        found[member].append(share)
    return found


def _in_turn(streams: Sequence[Iterator[tuple[_Readers, Block]]]) -> Iterator[tuple[int, tuple[_Readers, Block]]]:
    """What streams give, with the number of the stream: always the next of the one that has given the fewest bytes."""
    given_bytes = [(0, number) for number in range(len(streams))]
    while given_bytes:
        size_bytes, number = given_bytes[0]
        found = next(streams[number], None)
        if found is None:
            heappop(given_bytes)
        else:
            heapreplace(given_bytes, (size_bytes + _written_once_bytes(found[1]), number))
            yield number, found


def _blocks_of_share(sides: Sides, move: Move, share: Share) -> Iterator[Block]:
    start = 0
    for block in blocks(sides, move):
        if start >= share.end_byte:
            return
        if start >= share.first_byte:
            yield block
        start += _written_once_bytes(block)


def _written_once_bytes(block: Block) -> int:
    return sum(copy.targets[0].size_bytes for copy in block)


def _assign(
    block: Block,
    readers: _Readers,
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
