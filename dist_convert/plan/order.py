"""The order in which a member of a team takes its blocks: what it moves alone is spread between what crosses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from dist_convert.plan.assign import Assigned, Band, assigned_blocks, bands_of_share, owned_blocks, readers_in_turn
from dist_convert.plan.deal import Share
from dist_convert.plan.done import Done
from dist_convert.plan.moves import Move, Sides
from dist_convert.plan.teams import Team


def blocks_of_member(
    sides: Sides,
    moves: Sequence[Move],
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
        sides, moves: the plan.
        team, visible, done: as in `assigned_blocks`.
        member: position in `team.ranks`.
    """
    expand = partial(bands_of_share, sides, moves, team, visible)
    if len(team.ranks) == 1 or done.size_bytes:
        yield from assigned_blocks(expand, team, visible, done)
        return
    bands_of = _expanded_once(expand)
    by_share = [_owned_bytes(sides, moves[share.move], share, team, visible) for share in team.shares]
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


def _owned_bytes(sides: Sides, move: Move, share: Share, team: Team, visible: Sequence[frozenset[str]]) -> list[int]:
    """About what each member moves alone of a share. It paces: where it is wrong, some comes early or late.

    Nothing is expanded for it: shards of rows follow each other, and are taken as equally long, as in `deal`. What lies
    in several Hugging Face files is not told apart: where members see different ones, their own comes last.
    """
    owned = [0] * len(team.ranks)
    readers = readers_in_turn(sides, move, team, visible)
    if len(set(readers)) == 1:
        readers = readers[:1]
    elif sides.to_megatron or move.parameter.row.split == "columns":
        return owned
    for shard, members in enumerate(readers):
        first, end = (move.size_bytes * part // len(readers) for part in (shard, shard + 1))
        if len(members) == 1 and visible[team.ranks[members[0]]].issuperset(move.targets):
            owned[members[0]] += max(0, min(end, share.end_byte) - max(first, share.first_byte))
    return owned


def _size_bytes(block: Assigned) -> int:
    """What shares are counted in: a block's bytes in the target's dtype, once however often they are written."""
    return sum(read.size_bytes for read in block.reads)
