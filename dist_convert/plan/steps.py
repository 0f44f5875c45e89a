"""What each rank does, step by step: which pieces it reads, what crosses to other ranks, and what it writes.

A block whose pieces all lie with one rank is read and written there. A block whose pieces lie with several ranks (a
weight cut along its columns) crosses in a gather step, in which every member of the team takes part. All members
derive the same gather steps in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_convert.errors import BudgetTooSmall
from dist_convert.plan.limits import ALIGNMENT_BYTES, Limits, readers_of
from dist_convert.plan.moves import Move, blocks
from dist_convert.plan.source import MegatronSide
from dist_convert.plan.teams import Share, Team
from dist_convert.records import DTYPE_BYTES, Block, Copy, View


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
        readers = readers_of(move, team, visible)
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
