"""Which bytes each rank moves alone, and which ranks gather the others, so that all read and write about equally much.

What lies in one piece of the source, and goes to files that its reader reaches, is moved by one rank; a weight that is
cut along its columns is gathered by a group of ranks. Groups are disjoint: a rank is in one besides the world. In
`direct` placement every group is a single rank and nothing is gathered.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

from dist_convert.errors import MissingShard, UsageError
from dist_convert.plan.copies import Transfer
from dist_convert.records import FilesOfRanks

_Ranks = tuple[int, ...]

#: Sets of files with equal copies, of which one each must be seen.
FileSets = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ByteRange:
    """The blocks of a transfer, by its number in the plan, that start at byte `first_byte` to before `end_byte`."""

    transfer: int
    first_byte: int
    end_byte: int

    @property
    def size_bytes(self) -> int:
        return self.end_byte - self.first_byte


#: Some bytes, and what a rank or group must see for them.
_Work = tuple[ByteRange, FileSets]


def sees_all(needs: FileSets, seen: frozenset[str]) -> bool:
    """Whether one file of each set is among those seen."""
    return not any(seen.isdisjoint(files) for files in needs)


def union(ranks: Sequence[int], visible: FilesOfRanks) -> frozenset[str]:
    """The files that some ranks see together."""
    return frozenset[str]().union(*{visible[rank] for rank in ranks})


@dataclass(frozen=True)
class GatherGroup:
    """Ranks that gather what none of them can move alone.

    Attributes:
        ranks: in ascending order.
        together: what they gather and move together.
        alone: for each of them, what it both reads and writes.
    """

    ranks: tuple[int, ...]
    together: tuple[ByteRange, ...]
    alone: tuple[tuple[ByteRange, ...], ...]


def form_gather_groups(
    transfers: Sequence[Transfer],
    visible: FilesOfRanks,
    writable: FilesOfRanks,
    placement: str,
    finished: frozenset[int] = frozenset(),
) -> tuple[GatherGroup, ...]:
    """Divide the ranks into groups, and the transfers' bytes over ranks and groups.

    Args:
        visible, writable: for each rank, the source files that it can read, and the target files that it can write.
        placement: "gather" or "direct".
        finished: numbers of the transfers that need no group any more.

    Raises:
        MissingShard: a shard that no rank sees.
        UsageError: direct placement where some shard set is not seen whole by any single rank.
    """
    has_own_targets = len(set(writable)) > 1
    if has_own_targets:
        reached = {pair: pair[0].union(map(_as_target, pair[1])) for pair in zip(visible, writable, strict=True)}
        visible = [reached[pair] for pair in zip(visible, writable, strict=True)]
    singles: list[_Ranks] = [(rank,) for rank in range(len(visible))]
    able_ranks = _able(singles, visible)
    alone = []
    together = []
    gathered_bytes = Counter[FileSets]()
    for number, transfer in enumerate(transfers):
        first = 0
        for pieces, end in transfer.stretches if number not in finished else ():
            sources = tuple(transfer.source_files[piece] for piece in pieces)
            needs = (*sources, *((_as_target(file),) for file in transfer.target_files if has_own_targets))
            if (len(pieces) == 1 or placement == "direct") and able_ranks(needs):
                alone.append((ByteRange(number, first, end), needs))
            else:
                together.append((ByteRange(number, first, end), needs))
                gathered_bytes[sources] += end - first
            first = end
    if together and placement == "direct":
        what = f"no rank alone sees all shards of {', '.join(transfers[together[0][0].transfer].names)}"
        expected, remedy = "every rank sees every file, for --placement direct", "use --placement gather"
        raise UsageError(what, expected=expected, found="files on the disks of different machines", remedy=remedy)
    groups, bridges = singles, list[_Ranks]()
    if together:
        groups, bridges = _gather_groups(together, _shard_sets(gathered_bytes), visible, may_lend=has_own_targets)
    of_ranks = _dealt(alone, transfers, singles, able_ranks)
    of_groups = _dealt(together, transfers, groups, _able(groups, visible, bridges))
    return tuple(
        GatherGroup(ranks, ranges, tuple(of_ranks[rank] for rank in ranks))
        for ranks, ranges in zip(groups, of_groups, strict=True)
    )


def _as_target(file: str) -> str:
    """A target file's name among those of source files, of which one may be called alike."""
    return f"target {file}"


def _able(
    groups: Sequence[_Ranks], visible: FilesOfRanks, bridges: Sequence[_Ranks] = ()
) -> Callable[[FileSets], _Ranks]:
    """What finds the groups that see one file of each set, by their numbers; bridges only where no other does."""
    seeing: dict[frozenset[str], list[int]] = {}
    for number, ranks in enumerate(groups):
        seeing.setdefault(union(ranks, visible), []).append(number)

    @cache
    def able(needs: FileSets) -> _Ranks:
        found = sorted(number for files, of in seeing.items() if sees_all(needs, files) for number in of)
        return tuple([number for number in found if groups[number] not in bridges] or found)

    return able


def _dealt(
    work: Sequence[_Work], transfers: Sequence[Transfer], groups: Sequence[_Ranks], able: Callable[[FileSets], _Ranks]
) -> list[tuple[ByteRange, ...]]:
    """The ranges of each group: of all that the same groups can do and that is written equally often, its part."""
    kinds: dict[tuple[_Ranks, int], list[ByteRange]] = {}
    for byte_range, needs in work:
        transfer = transfers[byte_range.transfer]
        kinds.setdefault((able(needs), transfer.written_bytes // transfer.size_bytes), []).append(byte_range)
    dealt: list[list[ByteRange]] = [[] for _ in groups]
    for (numbers, _), whole in kinds.items():
        for position, byte_range in _stretches(whole, [len(groups[number]) for number in numbers]):
            dealt[numbers[position]].append(byte_range)
    # In the order of transfers, what is written often comes between what is not.
    return [_joined(sorted(ranges, key=lambda one: (one.transfer, one.first_byte))) for ranges in dealt]


def _joined(ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """Ranges that follow each other in one transfer as one: it is expanded once for each range of it."""
    joined: list[ByteRange] = []
    for byte_range in ranges:
        if joined and (joined[-1].transfer, joined[-1].end_byte) == (byte_range.transfer, byte_range.first_byte):
            joined[-1] = replace(joined[-1], end_byte=byte_range.end_byte)
        else:
            joined.append(byte_range)
    return tuple(joined)


def _stretches(whole: Sequence[ByteRange], weights: Sequence[int]) -> Iterator[tuple[int, ByteRange]]:
    """What each of several groups gets of some bytes, in proportion to its weight: position of the group, its range."""
    total_bytes = sum(one.size_bytes for one in whole)
    borders = [total_bytes * passed // sum(weights) for passed in accumulate(weights, initial=0)]
    start = 0
    for byte_range in whole:
        end = start + byte_range.size_bytes
        begun = bisect_right(borders, start, hi=len(weights))  # stretches that begin with this range or before it
        for position in range(begun - 1, bisect_left(borders, end, hi=len(weights))):
            first, last = max(borders[position], start), min(borders[position + 1], end)
            if first < last:
                shift = byte_range.first_byte - start
                yield position, ByteRange(byte_range.transfer, first + shift, last + shift)
        start = end


def _shard_sets(gathered_bytes: Mapping[FileSets, int]) -> list[FileSets]:
    """Sets of shards whose rows are gathered, of as many members as those have through which most bytes go.

    They are the tensor parallel sets of the experts where there are any, else of the layers.
    """
    of_members = Counter[int]()
    for shards, size_bytes in gathered_bytes.items():
        of_members[len(shards)] += size_bytes * (len(shards) > 1)
    return [shards for shards in gathered_bytes if len(shards) == max(of_members, key=of_members.__getitem__)]


def _gather_groups(
    work: Sequence[_Work], sets: Sequence[FileSets], visible: FilesOfRanks, *, may_lend: bool
) -> tuple[list[_Ranks], list[_Ranks]]:
    """Ranks that see the same files, merged where only several of them together see what they gather.

    Both are split again, for what a rank receives grows with what its group gathers. Where ranks of nodes could do most
    of it without others, and little crosses the nodes' own disks, each lends some ranks to groups for it: the bridges,
    which are returned on their own as well.
    """
    classes = _classes(range(len(visible)), visible)
    whole, merged = [*classes], list[_Ranks]()
    for needs in dict.fromkeys(needs for _, needs in work):
        candidates = whole + merged
        if not any(sees_all(needs, union(ranks, visible)) for ranks in candidates):
            chosen = _cover(needs, candidates, visible)
            whole = [ranks for ranks in whole if ranks not in chosen]
            merged = [ranks for ranks in merged if ranks not in chosen]
            merged.append(tuple(sorted(rank for ranks in chosen for rank in ranks)))
    bridges = []
    for ranks in [*merged] if may_lend else []:
        kept, lent = _lend([part for part in classes if part[0] in ranks], work, visible)
        if kept:
            merged.remove(ranks)
            whole += kept
            bridges += lent
    split = [group for ranks in whole for group in _split(ranks, sets, visible)]
    split += [group for ranks in merged for group in _split_merged(ranks, visible)]
    return sorted(split + bridges), bridges


def _classes(ranks: Iterable[int], visible: FilesOfRanks) -> list[_Ranks]:
    """The ranks that see the same files."""
    classes: dict[frozenset[str], list[int]] = {}
    for rank in ranks:
        classes.setdefault(visible[rank], []).append(rank)
    return [tuple(alike) for alike in classes.values()]


def _lend(classes: Sequence[_Ranks], work: Sequence[_Work], visible: FilesOfRanks) -> tuple[list[_Ranks], list[_Ranks]]:
    """What classes of a merged group keep, and the groups of ranks that they lend: one for each set of classes that
    together can do what none of them can do alone.

    A class lends ranks by the share of bytes, one at least. Nothing is kept where some class has too few for that, or
    where none has anything to gather among its own.
    """
    alone_bytes = Counter[_Ranks]()
    crossing_bytes = Counter[tuple[_Ranks, ...]]()
    together_see = union([part[0] for part in classes], visible)
    for some, needs in work:
        able = [part for part in classes if sees_all(needs, visible[part[0]])]
        alone_bytes.update(dict.fromkeys(able, some.size_bytes))
        if not able and sees_all(needs, together_see):
            crossing_bytes[tuple(sorted(_cover(needs, [*classes], visible)))] += some.size_bytes
    kept = {part: part for part in classes}
    lent = []
    for bridged, size_bytes in crossing_bytes.items():
        group: list[int] = []
        for part in bridged:
            through_bytes = sum(size // len(other) for other, size in crossing_bytes.items() if part in other)
            share = size_bytes / len(bridged) / max(1, alone_bytes[part] + through_bytes)
            count = max(1, round(len(part) * share))
            group += kept[part][-count:]
            kept[part] = kept[part][:-count]
        lent.append(tuple(sorted(group)))
    if not alone_bytes or not all(kept.values()):
        return [], []
    return list(kept.values()), lent


def _cover(needs: FileSets, candidates: list[_Ranks], visible: FilesOfRanks) -> list[_Ranks]:
    """The first candidates that together see one file of each set."""
    chosen: list[_Ranks] = []
    for files in needs:
        if union([rank for ranks in chosen for rank in ranks], visible).isdisjoint(files):
            seeing = next((ranks for ranks in candidates if not union(ranks, visible).isdisjoint(files)), None)
            if seeing is None:
                raise MissingShard("no rank sees a shard", expected=" or ".join(files), found="nothing")
            chosen.append(seeing)
    return chosen


def _split(ranks: _Ranks, sets: Sequence[FileSets], visible: FilesOfRanks) -> list[_Ranks]:
    """A group for each set of shards, as far as there are ranks, and no more ranks in a group than shards in a set."""
    served = sum(sees_all(needs, visible[ranks[0]]) for needs in sets)
    least_groups = -(-len(ranks) // max(len(needs) for needs in sets))
    return list(_parts(ranks, min(len(ranks), max(least_groups, served))))


def _split_merged(ranks: _Ranks, visible: FilesOfRanks) -> list[_Ranks]:
    """As many groups as can have a rank of each kind: all of them see the same files together."""
    classes = _classes(ranks, visible)
    groups = min(map(len, classes))
    parted = zip(*(_parts(alike, groups) for alike in classes), strict=True)
    return [tuple(sorted(rank for part in parts for rank in part)) for parts in parted]


def _parts(ranks: _Ranks, parts: int) -> Iterator[_Ranks]:
    """So many stretches of ranks, about equally long."""
    return (ranks[first:end] for first, end in pairwise(part * len(ranks) // parts for part in range(parts + 1)))
