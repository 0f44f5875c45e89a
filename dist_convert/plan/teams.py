"""Which ranks work together, and which bytes each team converts, so that all read and write about equally much.

A team gathers among its members; teams are disjoint, so a rank is in one gather group besides the world. In `direct`
placement every team is a single rank and nothing is gathered.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from dist_convert.errors import MissingShard, UsageError
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


@dataclass(frozen=True)
class Team:
    """Ranks that convert their shares together, in ascending order."""

    ranks: tuple[int, ...]
    shares: tuple[Share, ...]


def form_teams(
    moves: Sequence[Move],
    visible: Sequence[frozenset[str]],
    placement: str,
    finished: frozenset[int] = frozenset(),
) -> tuple[Team, ...]:
    """Divide the ranks into teams, and the moves' bytes over the teams.

    Args:
        moves: all moves of the plan.
        visible: for each rank, the shard files that it can read.
        placement: "gather" or "direct".
        finished: numbers of the moves that need no team any more.

    Raises:
        MissingShard: a shard that no rank sees.
        UsageError: direct placement where some shard set is not seen whole by any single rank.
    """
    bridges: list[tuple[int, ...]] = []
    if placement == "direct":
        groups: list[tuple[int, ...]] = [(rank,) for rank in range(len(visible))]
    else:
        groups, bridges = _gather_groups(moves, visible)
    shares = deal(moves, groups, bridges, visible, finished)
    return tuple(Team(ranks, tuple(listed)) for ranks, listed in zip(groups, shares, strict=True))


def _shard_sets(moves: Sequence[Move]) -> tuple[Homes, ...]:
    """The distinct tensor parallel sets: of the experts where there are any, else of the layers."""
    with_experts = [move for move in moves if move.parameter.expert is not None]
    most = max(len(move.needs) for move in with_experts or moves)
    return tuple(dict.fromkeys(move.needs for move in with_experts or moves if len(move.needs) == most))


def _gather_groups(
    moves: Sequence[Move], visible: Sequence[frozenset[str]]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Ranks that see the same files, merged where only several of them together see a whole set of shards.

    Both are split again, for what a rank receives grows with what its team gathers. Where ranks of nodes could do most
    moves alone, and few cross the nodes' own disks, each lends some ranks to teams for those, which are also returned
    on their own.
    """
    classes = _classes(range(len(visible)), visible)
    whole = [*classes]
    merged: list[tuple[int, ...]] = []
    for homes in dict.fromkeys(move.all_needs for move in moves):
        candidates = whole + merged
        if any(sees_all(homes, union(ranks, visible)) for ranks in candidates):
            continue
        chosen = _cover(homes, candidates, visible)
        whole = [ranks for ranks in whole if ranks not in chosen]
        merged = [ranks for ranks in merged if ranks not in chosen]
        merged.append(tuple(sorted(rank for ranks in chosen for rank in ranks)))
    bridges: list[tuple[int, ...]] = []
    for ranks in [*merged] if any(move.own_targets for move in moves) else []:
        kept, lent = _lend([part for part in classes if part[0] in ranks], moves, visible)
        if kept:
            merged.remove(ranks)
            whole += kept
            bridges += lent
    sets = _shard_sets(moves)
    split = [team for ranks in whole for team in _split(ranks, sets, visible)]
    split += [team for ranks in merged for team in _split_merged(ranks, visible)]
    return sorted(split + bridges), bridges


def _classes(ranks: Iterable[int], visible: Sequence[frozenset[str]]) -> list[tuple[int, ...]]:
    """The ranks that see the same files."""
    classes: dict[frozenset[str], list[int]] = {}
    for rank in ranks:
        classes.setdefault(visible[rank], []).append(rank)
    return [tuple(alike) for alike in classes.values()]


def _lend(
    classes: Sequence[tuple[int, ...]], moves: Sequence[Move], visible: Sequence[frozenset[str]]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """What classes of a merged team keep, and the teams of ranks that they lend: one for each set of classes that
    together do moves which none of them can do alone.

    A class lends ranks by the share of bytes, one at least. Nothing is kept where some class has too few for that.
    """
    alone_bytes: Counter[tuple[int, ...]] = Counter()
    crossing_bytes: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for move in moves:
        able = [part for part in classes if sees_all(move.all_needs, visible[part[0]])]
        alone_bytes.update(dict.fromkeys(able, move.size_bytes))
        if not able and sees_all(move.all_needs, union([part[0] for part in classes], visible)):
            crossing_bytes[tuple(sorted(_cover(move.all_needs, [*classes], visible)))] += move.size_bytes
    kept = {part: part for part in classes}
    lent: list[tuple[int, ...]] = []
    for bridged, size_bytes in crossing_bytes.items():
        team: list[int] = []
        for part in bridged:
            through_bytes = sum(size // len(other) for other, size in crossing_bytes.items() if part in other)
            share = size_bytes / len(bridged) / max(1, alone_bytes[part] + through_bytes)
            count = max(1, round(len(part) * share))
            team += kept[part][-count:]
            kept[part] = kept[part][:-count]
        lent.append(tuple(sorted(team)))
    if not all(kept.values()):
        return [], []
    return list(kept.values()), lent


def _cover(homes: Homes, candidates: list[tuple[int, ...]], visible: Sequence[frozenset[str]]) -> list[tuple[int, ...]]:
    chosen: list[tuple[int, ...]] = []
    for files in homes:
        if any(file in union(ranks, visible) for ranks in chosen for file in files):
            continue
        seeing = [ranks for ranks in candidates if any(file in union(ranks, visible) for file in files)]
        if not seeing:
            raise MissingShard("no rank sees a shard", expected=" or ".join(files), found="nothing")
        chosen.append(seeing[0])
    return chosen


def _split(ranks: tuple[int, ...], sets: tuple[Homes, ...], visible: Sequence[frozenset[str]]) -> list[tuple[int, ...]]:
    """A team for each set of shards, as far as there are ranks, and no more ranks in a team than shards in a set."""
    served = sum(sees_all(homes, visible[ranks[0]]) for homes in sets)
    least_teams = -(-len(ranks) // max(len(homes) for homes in sets))
    return list(_parts(ranks, min(len(ranks), max(least_teams, served))))


def _split_merged(ranks: tuple[int, ...], visible: Sequence[frozenset[str]]) -> list[tuple[int, ...]]:
    """As many teams as can have a rank of each kind: all of them see the same files together."""
    classes = _classes(ranks, visible)
    teams = min(map(len, classes))
    parted = zip(*(_parts(alike, teams) for alike in classes), strict=True)
    return [tuple(sorted(rank for part in parts for rank in part)) for parts in parted]


def _parts(ranks: tuple[int, ...], parts: int) -> Iterator[tuple[int, ...]]:
    """So many stretches of ranks, about equally long."""
    return (ranks[first:end] for first, end in pairwise(part * len(ranks) // parts for part in range(parts + 1)))
