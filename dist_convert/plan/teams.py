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
from dist_convert.plan.copies import Transfer

_Ranks = tuple[int, ...]

#: Sets of files of which a team must see one each.
Homes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Share:
    """The blocks of a transfer, by its number in the plan, that start at byte `first_byte` to before `end_byte`."""

    transfer: int
    first_byte: int
    end_byte: int


def sees_all(homes: Homes, seen: frozenset[str]) -> bool:
    """Whether one file of each set is among those seen."""
    return not any(seen.isdisjoint(files) for files in homes)


def union(ranks: Sequence[int], visible: Sequence[frozenset[str]]) -> frozenset[str]:
    """The files that some ranks see together."""
    return frozenset[str]().union(*{visible[rank] for rank in ranks})


@dataclass(frozen=True)
class Team:
    """Ranks that convert their shares together, in ascending order."""

    ranks: tuple[int, ...]
    shares: tuple[Share, ...]


def form_teams(
    transfers: Sequence[Transfer],
    visible: Sequence[frozenset[str]],
    placement: str,
    finished: frozenset[int] = frozenset(),
) -> tuple[Team, ...]:
    """Divide the ranks into teams, and the transfers' bytes over the teams.

    Args:
        transfers: all of the plan.
        visible: for each rank, the files that it can reach.
        placement: "gather" or "direct".
        finished: numbers of the transfers that need no team any more.

    Raises:
        MissingShard: a shard that no rank sees.
        UsageError: direct placement where some shard set is not seen whole by any single rank.
    """
    groups: list[_Ranks] = [(rank,) for rank in range(len(visible))]
    bridges: list[_Ranks] = []
    if placement != "direct":
        groups, bridges = _gather_groups(transfers, visible)
    shares: list[list[Share]] = [[] for _ in groups]
    for teams, whole in _kinds(transfers, groups, bridges, visible, finished):
        for position, share in _stretches(whole, [len(groups[team]) for team in teams]):
            shares[teams[position]].append(share)
    # In the order of transfers, what is gathered comes between what is not, and both go on at the same time.
    in_order = (_joined(sorted(listed, key=lambda share: (share.transfer, share.first_byte))) for listed in shares)
    return tuple(map(Team, groups, in_order))


def _kinds(
    transfers: Sequence[Transfer],
    groups: Sequence[_Ranks],
    bridges: Sequence[_Ranks],
    visible: Sequence[frozenset[str]],
    finished: frozenset[int],
) -> Iterable[tuple[tuple[int, ...], list[Share]]]:
    """The teams that can do bytes of one kind, and all of these: each team gets its part of every kind.

    A kind is told by its teams, by how often each byte is written, by whether a team of several ranks gathers it, and
    by the piece of the source, as members may see one only. So all members of all teams have about equally much.
    Bridges are teams that do only what no other can.
    """
    teams_seeing: dict[frozenset[str], list[int]] = {}
    for team, ranks in enumerate(groups):
        teams_seeing.setdefault(union(ranks, visible), []).append(team)
    able: dict[Homes, tuple[int, ...]] = {}
    kinds: dict[tuple[tuple[int, ...], int, bool, int], list[Share]] = {}
    for number, transfer in enumerate(transfers):
        if number in finished:
            continue
        needs = transfer.all_needs
        if needs not in able:
            seeing = [team for files, of in teams_seeing.items() if sees_all(needs, files) for team in of]
            able[needs] = tuple(sorted([team for team in seeing if groups[team] not in bridges] or seeing))
        teams = able[needs]
        if not teams:
            raise UsageError(
                f"no rank alone sees all shards of {', '.join(transfer.names)}",
                expected="every rank sees every file, for --placement direct",
                found="files on the disks of different machines",
                remedy="use --placement gather",
            )
        crosses = transfer.crosses and any(len(groups[team]) > 1 for team in teams)
        first = 0
        for piece, end in transfer.stretches:
            kind = (teams, transfer.written_bytes // transfer.size_bytes, crosses, piece)
            kinds.setdefault(kind, []).append(Share(number, first, end))
            first = end
    return ((teams, whole) for (teams, *_), whole in kinds.items())


def _joined(shares: Iterable[Share]) -> tuple[Share, ...]:
    """Shares that follow each other in one transfer as one: it is expanded once for each share of it."""
    joined: list[Share] = []
    for share in shares:
        if joined and (joined[-1].transfer, joined[-1].end_byte) == (share.transfer, share.first_byte):
            joined[-1] = replace(joined[-1], end_byte=share.end_byte)
        else:
            joined.append(share)
    return tuple(joined)


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
                yield position, Share(share.transfer, share.first_byte + first - start, share.first_byte + last - start)
        start = end


def _shard_sets(transfers: Sequence[Transfer]) -> tuple[Homes, ...]:
    """The distinct sets of files that are needed together: of those with fewest replicas, the ones with most members.

    They are the tensor parallel sets of the experts where there are any, else of the layers.
    """
    fewest = min(map(_replicas, transfers))
    alike = [transfer for transfer in transfers if _replicas(transfer) == fewest]
    most = max(len(transfer.needs) for transfer in alike)
    return tuple(dict.fromkeys(transfer.needs for transfer in alike if len(transfer.needs) == most))


def _replicas(transfer: Transfer) -> float:
    """How often each piece is stored in the source, times how often it is written."""
    return sum(map(len, transfer.needs)) / len(transfer.needs) * transfer.written_bytes / transfer.size_bytes


def _gather_groups(
    transfers: Sequence[Transfer], visible: Sequence[frozenset[str]]
) -> tuple[list[_Ranks], list[_Ranks]]:
    """Ranks that see the same files, merged where only several of them together see a whole set of shards.

    Both are split again, for what a rank receives grows with what its team gathers. Where ranks of nodes could do most
    transfers alone, and few cross the nodes' own disks, each lends some ranks to teams for those: the bridges, which
    are returned on their own as well.
    """
    classes = _classes(range(len(visible)), visible)
    whole, merged = [*classes], list[_Ranks]()
    for homes in dict.fromkeys(transfer.all_needs for transfer in transfers):
        candidates = whole + merged
        if not any(sees_all(homes, union(ranks, visible)) for ranks in candidates):
            chosen = _cover(homes, candidates, visible)
            whole = [ranks for ranks in whole if ranks not in chosen]
            merged = [ranks for ranks in merged if ranks not in chosen]
            merged.append(tuple(sorted(rank for ranks in chosen for rank in ranks)))
    bridges: list[_Ranks] = []
    for ranks in [*merged] if any(transfer.has_own_targets for transfer in transfers) else []:
        kept, lent = _lend([part for part in classes if part[0] in ranks], transfers, visible)
        if kept:
            merged.remove(ranks)
            whole += kept
            bridges += lent
    sets = _shard_sets(transfers)
    split = [team for ranks in whole for team in _split(ranks, sets, visible)]
    split += [team for ranks in merged for team in _split_merged(ranks, visible)]
    return sorted(split + bridges), bridges


def _classes(ranks: Iterable[int], visible: Sequence[frozenset[str]]) -> list[_Ranks]:
    """The ranks that see the same files."""
    classes: dict[frozenset[str], list[int]] = {}
    for rank in ranks:
        classes.setdefault(visible[rank], []).append(rank)
    return [tuple(alike) for alike in classes.values()]


def _lend(
    classes: Sequence[_Ranks], transfers: Sequence[Transfer], visible: Sequence[frozenset[str]]
) -> tuple[list[_Ranks], list[_Ranks]]:
    """What classes of a merged team keep, and the teams of ranks that they lend: one for each set of classes that
    together do transfers which none of them can do alone.

    A class lends ranks by the share of bytes, one at least. Nothing is kept where some class has too few for that.
    """
    alone_bytes: Counter[_Ranks] = Counter()
    crossing_bytes: Counter[tuple[_Ranks, ...]] = Counter()
    for transfer in transfers:
        able = [part for part in classes if sees_all(transfer.all_needs, visible[part[0]])]
        alone_bytes.update(dict.fromkeys(able, transfer.size_bytes))
        if not able and sees_all(transfer.all_needs, union([part[0] for part in classes], visible)):
            crossing_bytes[tuple(sorted(_cover(transfer.all_needs, [*classes], visible)))] += transfer.size_bytes
    kept = {part: part for part in classes}
    lent: list[_Ranks] = []
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


def _cover(homes: Homes, candidates: list[_Ranks], visible: Sequence[frozenset[str]]) -> list[_Ranks]:
    """The first candidates that together see one file of each set."""
    chosen: list[_Ranks] = []
    for files in homes:
        if union([rank for ranks in chosen for rank in ranks], visible).isdisjoint(files):
            seeing = next((ranks for ranks in candidates if not union(ranks, visible).isdisjoint(files)), None)
            if seeing is None:
                raise MissingShard("no rank sees a shard", expected=" or ".join(files), found="nothing")
            chosen.append(seeing)
    return chosen


def _split(ranks: _Ranks, sets: tuple[Homes, ...], visible: Sequence[frozenset[str]]) -> list[_Ranks]:
    """A team for each set of shards, as far as there are ranks, and no more ranks in a team than shards in a set."""
    served = sum(sees_all(homes, visible[ranks[0]]) for homes in sets)
    least_teams = -(-len(ranks) // max(len(homes) for homes in sets))
    return list(_parts(ranks, min(len(ranks), max(least_teams, served))))


def _split_merged(ranks: _Ranks, visible: Sequence[frozenset[str]]) -> list[_Ranks]:
    """As many teams as can have a rank of each kind: all of them see the same files together."""
    classes = _classes(ranks, visible)
    teams = min(map(len, classes))
    parted = zip(*(_parts(alike, teams) for alike in classes), strict=True)
    return [tuple(sorted(rank for part in parts for rank in part)) for parts in parted]


def _parts(ranks: _Ranks, parts: int) -> Iterator[_Ranks]:
    """So many stretches of ranks, about equally long."""
    return (ranks[first:end] for first, end in pairwise(part * len(ranks) // parts for part in range(parts + 1)))
