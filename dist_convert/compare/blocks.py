"""What is compared, and who compares it: the tensors that both checkpoints have, cut into blocks and dealt to ranks.

Every block goes to a rank that sees its files. Where shards lie on the nodes' own disks, a block that no rank sees as a
whole is cut further, until each part, and each copy of it, is with a rank that sees it and its counterpart. Copies on
different nodes are then compared with the other checkpoint and not with each other.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from dist_convert.errors import UsageError
from dist_convert.models.catalog import Catalog, Region, TensorMeta, cut
from dist_convert.records import DTYPE_BYTES, Box, FilesOfRanks, View, block_tiles, intersect, names

#: Bytes of one block in the wider of its two dtypes.
BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to be compared.

    Attributes:
        path: the directory of its files, as this rank sees it.
        kind: for people: "Hugging Face", or "Megatron" with its grid and iteration.
        says_vocab: whether the checkpoint itself tells the size of its vocabulary without padding.
        catalog: of its tensors.
        visible: for each rank, the files that it can read.
        copies: where nodes have different files of one name: a `name_at` for each of them, by the file's own name.
    """

    path: Path
    kind: str
    says_vocab: bool
    catalog: Catalog
    visible: FilesOfRanks
    copies: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, TensorMeta]:
        return self.catalog.tensors

    def regions(self, name: str) -> Sequence[Region]:
        """The catalog's regions, with each of several different files of one name as a replica."""
        regions = self.catalog.regions(name)
        if not self.copies:
            return regions
        named = [[replace(view, file=file) for view in r.replicas for file in self.copies[view.file]] for r in regions]
        return [replace(region, replicas=tuple(views)) for region, views in zip(regions, named, strict=True)]


@dataclass(frozen=True)
class Amount:
    """What a comparison counts.

    Attributes:
        elements: of the model.
        bytes_a, bytes_b: that are stored for them, all copies.
        copies_a_bytes, copies_b_bytes: of these, what is in copies beyond the first.
    """

    elements: int = 0
    bytes_a: int = 0
    bytes_b: int = 0
    copies_a_bytes: int = 0
    copies_b_bytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(*(first + second for first, second in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Block:
    """A box of a tensor that one rank compares.

    Attributes:
        tensor, box: its name, and the box in it.
        a, b: the regions of both checkpoints that lie in the box, cut to it (counted from the tensor).
        amount: what is compared here for the first time.
        between: "A and B", or which other copies of them.
    """

    tensor: str
    box: Box
    a: tuple[Region, ...]
    b: tuple[Region, ...]
    amount: Amount
    between: str = "A and B"

    @property
    def size_bytes(self) -> int:
        """Of everything that is read: every copy on both sides."""
        return _size_bytes(_views((*self.a, *self.b)))


def blocks(a: Checkpoint, b: Checkpoint, sample: Fraction) -> Iterator[Block]:
    """Every block of the tensors that both have in one shape, or a share of them; none of what neither side stores.

    The first and the last block of each tensor always belong to the sample.
    """
    for name, tensor in a.tensors.items():
        if name not in b.tensors or b.tensors[name].shape != tensor.shape:
            continue
        regions_a, regions_b = a.regions(name), b.regions(name)
        copies = _views((*regions_a, *regions_b))
        if not copies:
            continue
        item_bytes = max(DTYPE_BYTES[side.tensors[name].dtype] for side in (a, b))
        is_transposed = any(view.is_transposed for view in copies)
        boxes = list(block_tiles(tensor.rows, tensor.columns, item_bytes, BLOCK_BYTES, is_transposed=is_transposed))
        for number, box in enumerate(boxes):
            if number in (0, len(boxes) - 1) or is_sampled(name, number, sample):
                cuts = cut(regions_a, box), cut(regions_b, box)
                every = [_size_bytes(_views(regions)) for regions in cuts]
                further = [_size_bytes(view for r in regions for view in r.replicas[1:]) for regions in cuts]
                yield Block(name, box, *cuts, Amount(box.elements, *every, *further))


def _views(regions: Sequence[Region]) -> list[View]:
    return [view for region in regions for view in region.replicas]


def _size_bytes(views: Iterable[View]) -> int:
    return sum(view.size_bytes for view in views)


def is_sampled(tensor: str, number: int, share: Fraction) -> bool:
    """Whether a block belongs to the sample: by a hash, so that every run and every rank takes the same ones."""
    drawn = int.from_bytes(hashlib.sha256(f"{tensor}:{number}".encode()).digest()[:8], "big")
    return drawn < share * (1 << 64)


#: (files of A, files of B) that some ranks see -> these ranks.
_Sights = dict[tuple[frozenset[str], frozenset[str]], tuple[int, ...]]


def deal(a: Checkpoint, b: Checkpoint, sample: Fraction) -> Iterator[tuple[int, Block]]:
    """Every block with the rank that compares it, the least loaded of those that see its files.

    Raises:
        UsageError: no rank sees both a copy of A and the part of B that it is to be compared with.
    """
    sights: _Sights = {}
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
    files_a, files_b = ({view.file for view in _views(regions)} for regions in (block.a, block.b))
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
    done_a, done_b = set[View](), set[View]()
    for (in_a, in_b), ranks in sights.items():
        copies_a = tuple(view for view in a.replicas if view.file in in_a)
        copies_b = tuple(view for view in b.replicas if view.file in in_b)
        is_visible = bool(copies_a or not a.replicas) and bool(copies_b or not b.replicas)
        new_a, new_b = set(copies_a) - done_a, set(copies_b) - done_b
        if is_visible and (new_a or new_b):
            is_first = not done_a and not done_b
            bytes_a, bytes_b = _size_bytes(new_a), _size_bytes(new_b)
            first_a, first_b = ((r.replicas[0].size_bytes if r.replicas and is_first else 0) for r in (a, b))
            amount = Amount(box.elements * is_first, bytes_a, bytes_b, bytes_a - first_a, bytes_b - first_b)
            between = "A and B" if is_first else "copies of A and B on another node"
            cuts = (Region(box, copies_a, a.add),), (Region(box, copies_b, b.add),)
            yield ranks, Block(tensor, box, *cuts, amount, between)
            done_a |= new_a
            done_b |= new_b
    missed = [view for view in (*a.replicas, *b.replicas) if view not in done_a | done_b]
    if missed:
        files = (names(view.file for view in region.replicas) or "nothing" for region in (a, b))
        what = "no rank sees both this file of one checkpoint and its counterpart in the other"
        expected = "one rank that can read " + " and one of ".join(files)
        found = "these files lie on the disks of different nodes"
        remedy = "verify where one of the checkpoints is on a file system that all nodes share"
        raise UsageError(what, missed[0].file, expected, found, remedy, tensor=tensor)


@dataclass(frozen=True)
class Work:
    """What all ranks compare together: the share of blocks, the tensors that have some, what is counted of them,
    the bytes that are read for it, and a digest of who compares what."""

    sample: Fraction
    tensors: tuple[str, ...]
    amount: Amount
    size_bytes: int
    digest: str


def work_of(a: Checkpoint, b: Checkpoint, sample: Fraction) -> Work:
    """Count what there is to compare, before anything is read; raises what `deal` does."""
    tensors: dict[str, None] = {}
    amount, size_bytes, digest = Amount(), 0, hashlib.sha256()
    for rank, block in deal(a, b, sample):
        tensors[block.tensor] = None
        amount += block.amount
        size_bytes += block.size_bytes
        digest.update(f"{rank} {block.tensor} {block.box} {block.size_bytes}\n".encode())
    return Work(sample, tuple(tensors), amount, size_bytes, digest.hexdigest())
