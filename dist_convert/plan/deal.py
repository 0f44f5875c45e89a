"""Which bytes each team of ranks converts, so that all ranks read and write about equally much."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from dist_convert.errors import UsageError
from dist_convert.plan.moves import Move

#: Sets of files of which a team must see one each.
Homes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Share:
    """The blocks of one move that start at bytes `first_byte` up to (not including) `end_byte` of the move."""

    move: int
    first_byte: int
    end_byte: int


def sees_all(homes: Homes, seen: frozenset[str]) -> bool:
    """Whether one file of each set is among those seen."""
    return all(any(file in seen for file in files) for files in homes)


def union(ranks: Sequence[int], visible: Sequence[frozenset[str]]) -> frozenset[str]:
    """The files that some ranks see together."""
    return frozenset[str]().union(*(visible[rank] for rank in ranks))


@dataclass(frozen=True)
class _Kind:
    """Bytes of moves that every team gets its part of, so that all members of all teams have about equally much to do.

    Attributes:
        teams: that can do them.
        copies: how often each byte is written.
        split: of the parameter, which decides what is gathered; "" where nothing is.
        shard: whose rows they are, as members may see one shard only; 0 where that does not matter.
    """

    teams: tuple[int, ...]
    copies: int
    split: str
    shard: int


def deal(
    moves: Sequence[Move],
    groups: Sequence[tuple[int, ...]],
    bridges: Sequence[tuple[int, ...]],
    visible: Sequence[frozenset[str]],
    finished: frozenset[int],
) -> list[list[Share]]:
    """Cut each kind of bytes into contiguous stretches, in proportion to the teams' ranks.

    Args:
        moves: all moves of the plan.
        groups: the ranks of each team.
        bridges: those of them that do only what no other can.
        visible: for each rank, the files that it can reach.
        finished: numbers of the moves that need no team any more.

    Returns:
        For each team, its shares.

    Raises:
        UsageError: no team sees all that a move needs.
    """
    teams_seeing: dict[frozenset[str], list[int]] = {}
    for team, ranks in enumerate(groups):
        teams_seeing.setdefault(union(ranks, visible), []).append(team)
    able: dict[Homes, tuple[int, ...]] = {}
    kinds: dict[_Kind, list[Share]] = {}
    for number, move in enumerate(moves):
        if number in finished:
            continue
        needs = move.all_needs
        if needs not in able:
            seeing = [team for files, of in teams_seeing.items() if sees_all(needs, files) for team in of]
            able[needs] = tuple(sorted([team for team in seeing if groups[team] not in bridges] or seeing))
        teams = able[needs]
        if not teams:
            raise UsageError(
                f"no rank alone sees all shards of {move.parameter.name}",
                expected="every rank sees every file, for --placement direct",
                found="files on the disks of different machines",
                remedy="use --placement gather",
            )
        split = move.parameter.row.split if any(len(groups[team]) > 1 for team in teams) else ""
        shards = move.parameter.shards if split == "rows" else 1  # the order of `moves.copies`
        for shard in range(shards):
            first, end = (move.size_bytes * part // shards for part in (shard, shard + 1))
            kind = _Kind(teams, move.written_bytes // move.size_bytes, split, shard)
            kinds.setdefault(kind, []).append(Share(number, first, end))
    shares: list[list[Share]] = [[] for _ in groups]
    for kind, whole in kinds.items():
        for position, share in _stretches(whole, [len(groups[team]) for team in kind.teams]):
            shares[kind.teams[position]].append(share)
    # In the order of moves, what is gathered comes between what is not, and both go on at the same time.
    return [_joined(sorted(of_team, key=lambda share: (share.move, share.first_byte))) for of_team in shares]


def _joined(shares: Sequence[Share]) -> list[Share]:
    """Shares that follow each other in one move as one: a move is expanded once for each share of it."""
    joined: list[Share] = []
    for share in shares:
        if joined and (joined[-1].move, joined[-1].end_byte) == (share.move, share.first_byte):
            joined[-1] = replace(joined[-1], end_byte=share.end_byte)
        else:
            joined.append(share)
    return joined


def _stretches(whole: Sequence[Share], weights: Sequence[int]) -> Iterator[tuple[int, Share]]:
    """What each of several teams gets of some bytes, in proportion to its weight: position of the team, its share."""
    total_bytes = sum(share.end_byte - share.first_byte for share in whole)
    borders = [total_bytes * passed // sum(weights) for passed in accumulate(weights, initial=0)]
    start = 0
    for share in whole:
        end = start + share.end_byte - share.first_byte
        begun = bisect_right(borders, start, hi=len(weights))  # stretches that begin with this share or before it
        for position in range(begun - 1, bisect_left(borders, end, hi=len(weights))):
            first, last = max(borders[position], start), min(borders[position + 1], end)
            if first < last:
                yield position, Share(share.move, share.first_byte + first - start, share.first_byte + last - start)
        start = end
