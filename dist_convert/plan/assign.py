"""Who reads and who writes each block of a team's share, and the order in which a member takes its blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from dist_convert.plan.copies import Ends, Transfer, bands, blocks_of_band, part_of
from dist_convert.plan.done import Done
from dist_convert.plan.limits import able_readers, readers_of
from dist_convert.plan.teams import Share, Team
from dist_convert.records import DTYPE_BYTES, Block, Copy, View, Window, side_by_side

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
class Assigned:
    """The reads and writes of one block; offsets are given when it is packed."""

    reads: tuple[Read, ...]
    writes: tuple[Write, ...]


@dataclass(frozen=True)
class Band:
    """Copies that are cut together (`copies.bands`), of which a share has some blocks at least.

    Attributes:
        transfer: that they belong to.
        whole: the copies.
        kept: those of them, and of their targets, that the transfer itself has; fewer where it is a part.
        start_byte: of the transfer, where they begin.
        readers: of the transfer.
        owner: the one member that reads and writes all of them, where that is known whatever has been dealt before.
    """

    transfer: Transfer
    whole: Block
    kept: Block
    start_byte: int
    readers: _Readers
    owner: int | None


def readers_in_turn(
    ends: Ends, transfer: Transfer, team: Team, visible: Sequence[frozenset[str]]
) -> list[tuple[int, ...]]:
    """For each piece of the source, the members that read it in turn: what has no owner, all that see it."""
    return (readers_of if ends.source.is_owned else able_readers)(transfer, team, visible)


def bands_of_share(
    ends: Ends, transfers: Sequence[Transfer], team: Team, visible: Sequence[frozenset[str]], share: Share
) -> Iterator[Band]:
    """The bands that a share of a team has blocks of, with the member that moves those alone."""
    transfer = transfers[share.transfer]
    seen = [visible[rank] for rank in team.ranks]
    readers = dict(zip(transfer.source_files, readers_in_turn(ends, transfer, team, visible), strict=True))
    end = 0
    for whole in bands(ends, transfer.names):
        kept = part_of(transfer, whole)
        start, end = end, end + _target_bytes(kept)
        if share.first_byte < end and start < share.end_byte:
            yield Band(transfer, whole, kept, start, readers, _owner(kept, readers, seen))


def owned_blocks(band: Band, share: Share, team: Team, visible: Sequence[frozenset[str]]) -> Iterator[Assigned]:
    """A share's blocks of a band that one member moves alone."""
    seen = [visible[rank] for rank in team.ranks]
    nothing = [0] * len(seen)  # nobody else is to be chosen
    for block in _blocks_in_share(band, share):
        yield _assign(block, band.readers, seen, nothing, nothing)


def _blocks_in_share(band: Band, share: Share) -> Iterator[Block]:
    start = band.start_byte
    for block in blocks_of_band(band.transfer, band.whole):
        first, start = start, start + _target_bytes(block)
        if share.first_byte <= first < share.end_byte:
            yield block


def assigned_blocks(
    bands_of: Callable[[Share], Iterable[Band]],
    team: Team,
    visible: Sequence[frozenset[str]],
    done: Done,
    *,
    leave_out_owned: bool = False,
) -> Iterator[Assigned]:
    """The team's blocks with the replica that is read, and the members that read and write; without what is done.

    Args:
        bands_of: what `bands_of_share` finds for a share of the team.
        team: its ranks and shares.
        visible: for each rank of the world, the files that it can read or write.
        done: what need not be written any more.
        leave_out_owned: leaves out the blocks of bands that have an owner, whom they are counted for.
    """
    seen = [visible[rank] for rank in team.ranks]
    written_bytes = [0] * len(seen)
    # Apart for each number of copies that are written, so that who reads as much as others also writes as much.
    read_bytes: dict[int, list[int]] = defaultdict(lambda: [0] * len(seen))
    for share in team.shares:
        for band in bands_of(share):
            if band.owner is not None and leave_out_owned:
                end_byte = band.start_byte + _target_bytes(band.kept)
                is_all = share.first_byte <= band.start_byte and end_byte <= share.end_byte
                read_of_kind = read_bytes[len(band.kept[0].targets)]
                for part in (band.kept,) if is_all else _blocks_in_share(band, share):
                    read_of_kind[band.owner] += sum(_seen_by(copy, seen[band.owner]).size_bytes for copy in part)
                    written_bytes[band.owner] += sum(target.size_bytes for copy in part for target in copy.targets)
                continue
            for block in _blocks_in_share(band, share):
                read_of_kind = read_bytes[len(block[0].targets)]
                assigned = _assign(block, band.readers, seen, read_of_kind, written_bytes)
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
    return Assigned(tuple(reads), tuple(map(Write, targets, map(tuple, parts), writers)))


def _writer(target: View, alone: int | None, seen: Sequence[frozenset[str]], written_bytes: Sequence[int]) -> int:
    """The only reader where it can reach the target's file, else the member that can and has written least."""
    if alone is not None and target.file in seen[alone]:
        return alone
    able = [member for member, files in enumerate(seen) if target.file in files]
    return min(able, key=lambda member: written_bytes[member])


def blocks_of_member(
    ends: Ends,
    transfers: Sequence[Transfer],
    team: Team,
    visible: Sequence[frozenset[str]],
    done: Done,
    member: int,
) -> Iterator[Assigned]:
    """The team's blocks as one member takes them, without what others move alone as far as that is known beforehand.

    What crosses comes in the same order for all members, and each does about an equal part of its own in between, so
    that none waits long for another. Its own begins elsewhere for each: a file takes the writes of one at a time.

    Where an earlier run has done some of it, all members go through all that is left, in the order of the plan.

    Args:
        ends, transfers: the plan.
        team, visible, done: as in `assigned_blocks`.
        member: position in `team.ranks`.
    """
    expand = partial(bands_of_share, ends, transfers, team, visible)
    if len(team.ranks) == 1 or done.size_bytes:
        yield from assigned_blocks(expand, team, visible, done)
        return
    bands_of = _expanded_once(expand)
    by_share = [_owned_bytes(ends, transfers[share.transfer], share, team, visible) for share in team.shares]
    own_by_share = [of_member[member] for of_member in by_share]
    own_bytes = sum(own_by_share)
    # What crosses, and the little that turns out to be one member's only when it is dealt.
    other_bytes = sum(share.end_byte - share.first_byte for share in team.shares) - sum(map(sum, by_share))
    # Not member / members: the first place is where what crosses begins.
    begun_bytes = own_bytes * (member + 1) // (len(team.ranks) + 1)

    def owned() -> Iterator[Assigned]:
        for share in _rotated(team.shares, own_by_share, begun_bytes):
            for band in bands_of(share):
                if band.owner == member:
                    yield from owned_blocks(band, share, team, visible)

    own = owned()
    own_passed_bytes = other_passed_bytes = 0
    for block in assigned_blocks(bands_of, team, visible, done, leave_out_owned=True):
        while own_passed_bytes * other_bytes < other_passed_bytes * own_bytes and (mine := next(own, None)):
            own_passed_bytes += _size_bytes(mine)
            yield mine
        other_passed_bytes += _size_bytes(block)
        yield block
    yield from own


def _expanded_once(bands_of: Callable[[Share], Iterable[Band]]) -> Callable[[Share], Iterable[Band]]:
    """The same for two who go through shares in different orders: who is first at one leaves its bands to the other.

    Whoever asks once more gets the same again.
    """
    left: dict[Share, list[Band]] = {}

    def bands(share: Share) -> Iterable[Band]:
        known = left.pop(share, None)
        if known is None:
            known = left[share] = list(bands_of(share))
        return known

    return bands


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


def _owned_bytes(
    ends: Ends, transfer: Transfer, share: Share, team: Team, visible: Sequence[frozenset[str]]
) -> list[int]:
    """About what each member moves alone of a share. It paces: where it is wrong, some comes early or late.

    Nothing is expanded for it. What lies in several files without owners is not told apart: where members see different
    ones, their own comes last.
    """
    owned = [0] * len(team.ranks)
    readers = readers_in_turn(ends, transfer, team, visible)
    if transfer.crosses or (not ends.source.is_owned and len(set(readers)) > 1):
        return owned
    first = 0
    for piece, end in transfer.stretches:
        members = readers[piece]
        if len(members) == 1 and visible[team.ranks[members[0]]].issuperset(transfer.target_files):
            owned[members[0]] += max(0, min(end, share.end_byte) - max(first, share.first_byte))
        first = end
    return owned


def _size_bytes(block: Assigned) -> int:
    """What shares are counted in: a block's bytes in the target's dtype, once however often they are written."""
    return sum(read.size_bytes for read in block.reads)
