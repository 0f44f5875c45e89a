"""Which ranks work together, and which bytes each team of ranks converts.

A team gathers among its members; teams are disjoint, so a rank is in one gather group besides the world. In `direct`
placement every team is a single rank and nothing is gathered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    shares = _deal(moves, groups, bridges, visible, finished)
    return tuple(Team(ranks, tuple(listed)) for ranks, listed in zip(groups, shares, strict=True))


def _sees_all(homes: Homes, seen: frozenset[str]) -> bool:
    return all(any(file in seen for file in files) for files in homes)


def _union(ranks: Sequence[int], visible: Sequence[frozenset[str]]) -> frozenset[str]:
    return frozenset[str]().union(*(visible[rank] for rank in ranks))


def _shard_sets(moves: Sequence[Move]) -> tuple[Homes, ...]:
    """The distinct tensor parallel sets: of the experts where there are any, else of the layers."""
    with_experts = [move for move in moves if move.parameter.expert is not None]
    most = max(len(move.needs) for move in with_experts or moves)
    return tuple(dict.fromkeys(move.needs for move in with_experts or moves if len(move.needs) == most))


def _gather_groups(
    moves: Sequence[Move], visible: Sequence[frozenset[str]]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Ranks that see the same files, merged where only several of them together see a whole set of shards.

    Ranks that see whole sets are split again: one team for each set, as far as there are ranks. Where ranks of nodes
    could do most moves alone, and few cross the nodes' own disks, each lends some ranks to teams for those, which are
    also returned on their own.
    """
    classes: dict[frozenset[str], tuple[int, ...]] = {}
    for rank, seen in enumerate(visible):
        classes[seen] = (*classes.get(seen, ()), rank)
    whole = list(classes.values())
    merged: list[tuple[int, ...]] = []
    for homes in dict.fromkeys(move.all_needs for move in moves):
        candidates = whole + merged
        if any(_sees_all(homes, _union(ranks, visible)) for ranks in candidates):
            continue
        chosen = _cover(homes, candidates, visible)
        whole = [ranks for ranks in whole if ranks not in chosen]
        merged = [ranks for ranks in merged if ranks not in chosen]
        merged.append(tuple(sorted(rank for ranks in chosen for rank in ranks)))
    bridges: list[tuple[int, ...]] = []
    for ranks in [*merged] if any(move.own_targets for move in moves) else []:
        kept, lent = _lend([part for part in classes.values() if part[0] in ranks], moves, visible)
        if kept:
            merged.remove(ranks)
            whole += kept
            bridges += lent
    sets = _shard_sets(moves)
    split = [team for ranks in whole for team in _split(ranks, sets, visible)]
    return sorted(split + merged + bridges), bridges


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
        able = [part for part in classes if _sees_all(move.all_needs, visible[part[0]])]
        alone_bytes.update(dict.fromkeys(able, move.size_bytes))
        if not able and _sees_all(move.all_needs, _union([part[0] for part in classes], visible)):
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
        if any(file in _union(ranks, visible) for ranks in chosen for file in files):
            continue
        seeing = [ranks for ranks in candidates if any(file in _union(ranks, visible) for file in files)]
        if not seeing:
            raise MissingShard("no rank sees a shard", expected=" or ".join(files), found="nothing")
        chosen.append(seeing[0])
    return chosen


def _split(ranks: tuple[int, ...], sets: tuple[Homes, ...], visible: Sequence[frozenset[str]]) -> list[tuple[int, ...]]:
    served = sum(_sees_all(homes, visible[ranks[0]]) for homes in sets)
    teams = min(len(ranks), max(1, served))
    borders = [team * len(ranks) // teams for team in range(teams + 1)]
    return [ranks[first:end] for first, end in pairwise(borders)]


def _deal(
    moves: Sequence[Move],
    groups: Sequence[tuple[int, ...]],
    bridges: Sequence[tuple[int, ...]],
    visible: Sequence[frozenset[str]],
    finished: frozenset[int],
) -> list[list[Share]]:
    """Cut the moves' bytes into contiguous stretches, in proportion to the ranks of the teams that can do them.

    Bridges do only what no other team can.
    """
    seen = [_union(ranks, visible) for ranks in groups]
    able: dict[Homes, tuple[int, ...]] = {}
    moves_of: dict[tuple[int, ...], list[int]] = {}
    for number, move in enumerate(moves):
        if number in finished:
            continue
        needs = move.all_needs
        if needs not in able:
            teams = tuple(team for team, files in enumerate(seen) if _sees_all(needs, files))
            able[needs] = tuple(team for team in teams if groups[team] not in bridges) or teams
        if not able[needs]:
            raise UsageError(
                f"no rank alone sees all shards of {move.parameter.name}",
                expected="every rank sees every file, for --placement direct",
                found="files on the disks of different machines",
                remedy="use --placement gather",
            )
        moves_of.setdefault(able[needs], []).append(number)
    shares: list[list[Share]] = [[] for _ in groups]
    for teams, numbers in moves_of.items():
        ends = _ends({team: len(groups[team]) for team in teams}, sum(moves[n].size_bytes for n in numbers))
        start = 0
        for number in numbers:
            end = start + moves[number].size_bytes
            for team, (first_byte, end_byte) in ends.items():
                first, last = max(first_byte, start), min(end_byte, end)
                if first < last:
                    shares[team].append(Share(number, first - start, last - start))
            start = end
    return shares


def _ends(weights: Mapping[int, int], total_bytes: int) -> dict[int, tuple[int, int]]:
    whole, passed, ends = sum(weights.values()), 0, {}
    for team, weight in weights.items():
        ends[team] = (total_bytes * passed // whole, total_bytes * (passed + weight) // whole)
        passed += weight
    return ends
