"""Who compares what: every block goes to a rank that sees its files; every rank works that out alike.

Where shards lie on the nodes' own disks, a block that no rank sees as a whole is cut further, until each part of it,
and each copy of that part, is with a rank that sees it and its counterpart. Copies on different nodes are then compared
with the other checkpoint and not with each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from fractions import Fraction

from dist_convert.boxes import Box, intersect
from dist_convert.errors import UsageError
from dist_convert.records import View
from dist_convert.verify.blocks import Amount, Block, blocks, cut
from dist_convert.verify.catalog import Checkpoint, Region

#: (files of A, files of B) that some ranks see -> these ranks.
_Sights = Mapping[tuple[frozenset[str], frozenset[str]], tuple[int, ...]]


def deal(a: Checkpoint, b: Checkpoint, sample: Fraction) -> Iterator[tuple[int, Block]]:
    """Every block with the rank that compares it, the least loaded of those that see its files.

    Raises:
        UsageError: no rank sees both a copy of A and the part of B that it is to be compared with.
    """
    sights: dict[tuple[frozenset[str], frozenset[str]], tuple[int, ...]] = {}
    for rank, sight in enumerate(zip(a.visible, b.visible, strict=True)):
        sights[sight] = (*sights.get(sight, ()), rank)
    loads: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for whole in blocks(a, b, sample):
        for ranks, block in _seen(whole, sights):
            if ranks not in loads:
                loads[ranks] = [(0, rank) for rank in ranks]
            load_bytes, rank = loads[ranks][0]
            heapq.heapreplace(loads[ranks], (load_bytes + block.size_bytes, rank))
            yield rank, block


def _seen(block: Block, sights: _Sights) -> Iterator[tuple[tuple[int, ...], Block]]:
    """A block as it is, or its parts, each with the ranks that see it."""
    if len(sights) == 1:
        yield next(iter(sights.values())), block
        return
    files_a, files_b = ({v.file for region in regions for v in region.copies} for regions in (block.a, block.b))
    ranks = [rank for (in_a, in_b), seeing in sights.items() if files_a <= in_a and files_b <= in_b for rank in seeing]
    if ranks:
        yield tuple(sorted(ranks)), block
        return
    for region_a in block.a:
        for region_b in block.b:
            box = intersect(region_a.box, region_b.box)
            if box is not None:
                yield from _part(block.tensor, box, *cut((region_a,), box), *cut((region_b,), box), sights=sights)


def _part(tensor: str, box: Box, a: Region, b: Region, *, sights: _Sights) -> Iterator[tuple[tuple[int, ...], Block]]:
    """One region of each side, once for every group of ranks that sees a copy which no other group has compared."""
    done_a: set[View] = set()
    done_b: set[View] = set()
    for (in_a, in_b), ranks in sights.items():
        copies_a = tuple(view for view in a.copies if view.file in in_a)
        copies_b = tuple(view for view in b.copies if view.file in in_b)
        is_visible = bool(copies_a or not a.copies) and bool(copies_b or not b.copies)
        new_a, new_b = set(copies_a) - done_a, set(copies_b) - done_b
        if is_visible and (new_a or new_b):
            is_first = not done_a and not done_b
            bytes_a, bytes_b = (sum(view.size_bytes for view in new) for new in (new_a, new_b))
            first_a, first_b = ((r.copies[0].size_bytes if r.copies and is_first else 0) for r in (a, b))
            amount = Amount(box.elements * is_first, bytes_a, bytes_b, bytes_a - first_a, bytes_b - first_b)
            between = "A and B" if is_first else "copies of A and B on another node"
            yield ranks, Block(tensor, box, (Region(box, copies_a),), (Region(box, copies_b),), amount, between)
            done_a |= new_a
            done_b |= new_b
    missed = [view for view in (*a.copies, *b.copies) if view not in done_a | done_b]
    if missed:
        raise UsageError(
            "no rank sees both this file of one checkpoint and its counterpart in the other",
            tensor=tensor,
            file=missed[0].file,
            expected="one rank that can read " + " and one of ".join(_files(region) for region in (a, b)),
            found="these files lie on the disks of different nodes",
            remedy="verify where one of the checkpoints is on a file system that all nodes share",
        )


def _files(region: Region) -> str:
    return ", ".join(view.file for view in region.copies[:8]) or "nothing"
