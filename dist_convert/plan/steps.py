"""What each rank does, step by step: which pieces it reads, what crosses to other ranks, and what it writes.

A block whose pieces all lie with one rank is read and written there. A block whose pieces lie with several ranks (a
weight cut along its columns) crosses in a gather step, in which every member of the team takes part. All members
derive the same gather steps in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_convert.errors import BudgetTooSmall
from dist_convert.plan.moves import BLOCK_BYTES, Move, blocks
from dist_convert.plan.source import MegatronSide
from dist_convert.plan.teams import Share, Team
from dist_convert.records import DTYPE_BYTES, Block, Copy, View

#: Small steps keep reading, gathering and writing close together; 8 MiB is where larger ones stop paying.
STEP_BYTES = 8 << 20

#: A rank reads ahead one step, gathers one and writes one.
SLOTS = 3

#: Pieces begin at multiples of this in buffers, so that every dtype is aligned.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Piece:
    """One copy of a block: read by a rank of the team, to an offset of its buffer, as packed target values."""

    copy: Copy
    source: View
    reader: int
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.copy.targets[0].size_bytes


@dataclass(frozen=True)
class PlacedBlock:
    """The pieces of one block, side by side in the target's rows, and the rank that writes them."""

    pieces: tuple[Piece, ...]
    writer: int


@dataclass(frozen=True)
class Step:
    """Blocks done together. `send_bytes` is what each member contributes to the gather; 0 where nothing crosses."""

    blocks: tuple[PlacedBlock, ...]
    send_bytes: int


@dataclass(frozen=True)
class Limits:
    """Sizes of one rank's buffers, in bytes."""

    step_bytes: int
    send_bytes: int
    members: int

    @property
    def received_bytes(self) -> int:
        return self.send_bytes * self.members if self.members > 1 else 0

    @property
    def total_bytes(self) -> int:
        """All that the data path allocates: slots, scratch for reading and casting, the writer's rows, and the
        staging buffer that a gather over gloo allocates for itself."""
        slots = SLOTS * (self.step_bytes + self.received_bytes)
        return slots + 5 * BLOCK_BYTES + self.received_bytes


def limits(budget_bytes: int, members: int) -> Limits:
    """The largest useful buffers within a rank's budget.

    Raises:
        BudgetTooSmall: it does not even hold steps of one block.
    """
    for step_bytes in (STEP_BYTES, BLOCK_BYTES):
        left_bytes = budget_bytes - Limits(step_bytes, 0, members).total_bytes
        if members == 1 and left_bytes >= 0:
            return Limits(step_bytes, 0, 1)
        send_bytes = left_bytes // ((SLOTS + 1) * members) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if members > 1 and send_bytes >= BLOCK_BYTES // members:
            return Limits(step_bytes, min(send_bytes, step_bytes), members)
    least = Limits(BLOCK_BYTES, BLOCK_BYTES // members if members > 1 else 0, members)
    raise _too_small(least.total_bytes, budget_bytes)


def _too_small(needed_bytes: int, budget_bytes: int) -> BudgetTooSmall:
    return BudgetTooSmall(
        "the memory budget does not hold one step",
        expected=f"--max-memory-per-rank of at least {-(-needed_bytes // 1_000_000)}MB",
        found=f"{budget_bytes // 1_000_000}MB",
        remedy="raise --max-memory-per-rank, or use --placement direct where every rank sees all files",
    )


def steps_of_rank(
    side: MegatronSide,
    moves: Sequence[Move],
    team: Team,
    member: int,
    visible: Sequence[frozenset[str]],
    limit: Limits,
    *,
    add_to_norms: int,
) -> Iterator[Step]:
    """The steps of one member of a team, in order.

    Args:
        side, moves: the plan.
        team: its ranks and shares.
        member: position in `team.ranks`.
        visible: for each rank of the world, the files that it can read.
        limit: buffer sizes, the same for all members.
        add_to_norms: see `moves.copies`.

    Raises:
        BudgetTooSmall: a single block does not fit.
    """
    local = _Packer(limit.step_bytes, crosses=False)
    crossing = _Packer(limit.send_bytes, crosses=True)
    for pieces in _assigned_blocks(side, moves, team, visible, add_to_norms=add_to_norms):
        readers = {reader for _, _, reader in pieces}
        if len(readers) == 1:
            if readers == {member}:
                yield from local.add(pieces)
        else:
            yield from crossing.add(pieces)
    yield from crossing.flush()
    yield from local.flush()


_Assigned = tuple[tuple[Copy, View, int], ...]


def _assigned_blocks(
    side: MegatronSide,
    moves: Sequence[Move],
    team: Team,
    visible: Sequence[frozenset[str]],
    *,
    add_to_norms: int,
) -> Iterator[_Assigned]:
    """The team's blocks, each copy with the replica that is read and the member that reads it."""
    turn = 0
    for share in team.shares:
        move = moves[share.move]
        readers = _readers(move, team, visible)
        for block in _blocks_of_share(side, move, share, add_to_norms=add_to_norms):
            assigned = []
            for copy in block:
                candidates = readers[move.homes.index(tuple(view.file for view in copy.sources))]
                reader = candidates[turn % len(candidates)]
                seen = visible[team.ranks[reader]]
                assigned.append((copy, next(view for view in copy.sources if view.file in seen), reader))
            yield tuple(assigned)
            turn += 1


def _blocks_of_share(side: MegatronSide, move: Move, share: Share, *, add_to_norms: int) -> Iterator[Block]:
    start = 0
    for block in blocks(side, move, add_to_norms=add_to_norms):
        if start >= share.end_byte:
            return
        if start >= share.first_byte:
            yield block
        start += sum(copy.targets[0].size_bytes for copy in block)


def _readers(move: Move, team: Team, visible: Sequence[frozenset[str]]) -> list[tuple[int, ...]]:
    """For each shard of a move, the members that read it in turn: each member owns as few shards as possible."""
    eligible = [
        tuple(m for m, rank in enumerate(team.ranks) if any(file in visible[rank] for file in files))
        for files in move.homes
    ]
    readers = []
    for shard, members in enumerate(eligible):
        alike = [other for other, others in enumerate(eligible) if others == members]
        position, count = alike.index(shard), len(alike)
        first = position * len(members) // count
        end = max(first + 1, (position + 1) * len(members) // count)
        readers.append(members[first:end])
    return readers


class _Packer:
    """Packs blocks into steps in which no member's share of bytes exceeds a limit."""

    def __init__(self, limit_bytes: int, *, crosses: bool) -> None:
        self._limit_bytes = limit_bytes
        self._crosses = crosses
        self._blocks: list[PlacedBlock] = []
        self._filled: dict[int, int] = {}
        self._turn = 0

    def add(self, pieces: _Assigned) -> Iterator[Step]:
        """Take one block in; yield the step before it where the block no longer fits. Readers write in turn."""
        needed: dict[int, int] = {}
        for copy, _, reader in pieces:
            needed[reader] = needed.get(reader, 0) + _aligned(copy.targets[0].size_bytes)
        if max(needed.values()) > self._limit_bytes:
            raise BudgetTooSmall(
                "one block does not fit the buffers that the memory budget leaves",
                tensor=pieces[0][0].targets[0].tensor,
                expected=f"{max(needed.values())} bytes for each member of the group",
                found=f"{self._limit_bytes} bytes",
                remedy="raise --max-memory-per-rank",
            )
        if any(self._filled.get(reader, 0) + size > self._limit_bytes for reader, size in needed.items()):
            yield from self.flush()
        placed = []
        for copy, source, reader in pieces:
            offset_bytes = self._filled.get(reader, 0)
            placed.append(Piece(copy, source, reader, offset_bytes))
            self._filled[reader] = offset_bytes + _aligned(copy.targets[0].size_bytes)
        self._blocks.append(PlacedBlock(tuple(placed), placed[self._turn % len(placed)].reader))
        self._turn += 1

    def flush(self) -> Iterator[Step]:
        """Yield what has been packed since the last step, if anything."""
        if self._blocks:
            yield Step(tuple(self._blocks), max(self._filled.values()) if self._crosses else 0)
        self._blocks, self._filled = [], {}


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def bytes_of(step: Step, member: int) -> tuple[int, int, int]:
    """What one member reads from files, receives from others, and writes to files in a step."""
    pieces = [piece for block in step.blocks for piece in block.pieces]
    read = sum(p.source.rows * p.source.columns * DTYPE_BYTES[p.source.dtype] for p in pieces if p.reader == member)
    written = sum(p.size_bytes for block in step.blocks if block.writer == member for p in block.pieces)
    return read, step.send_bytes, written
