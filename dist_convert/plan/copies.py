"""The copies between both ends of a tensor, and the bands of copies that are cut into blocks together.

Copies are expanded when they are needed, and never all at once: a model of 256 experts has hundreds of thousands. What
is kept of them is a `Transfer` for each group of tensors that lie in one stored tensor.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import TypeVar

from dist_convert.errors import PlanError
from dist_convert.models.catalog import Catalog, Region
from dist_convert.records import DTYPE_BYTES, Block, Box, Copy, alternating, block_tiles, in_turn, intersect, tiles

#: Bytes of one block. Fixed, so that results never depend on ranks or budget.
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Ends:
    """Both ends of a conversion, of the same tensors.

    `repeat_last_row` fills the target's padding rows with the last row of the tensor, not with zeros.
    """

    source: Catalog
    target: Catalog
    repeat_last_row: bool = False


@dataclass(frozen=True)
class Transfer:
    """The copies of some tensors that lie in one stored tensor, on either side.

    Attributes:
        names: of the tensors.
        size_bytes: of the copies, in the target's dtype, counting equal targets once.
        source_files: for each piece of the source, the files that hold it (equal copies).
        target_files: the files that are written to.
        target_bytes: how much, for each of these.
        stretches: which pieces of the source, by their number, each row is read from, and up to which byte this holds.
    """

    names: tuple[str, ...]
    size_bytes: int
    source_files: tuple[tuple[str, ...], ...]
    target_files: tuple[str, ...]
    target_bytes: tuple[int, ...]
    stretches: tuple[tuple[tuple[int, ...], int], ...]

    @property
    def written_bytes(self) -> int:
        """Of the copies, counting every equal target."""
        return sum(self.target_bytes)

    def renamed(self, names: tuple[str, ...], files: Mapping[str, str]) -> "Transfer":
        """The same of other tensors, in files that are called otherwise."""
        sources = tuple(tuple(files[file] for file in alike) for alike in self.source_files)
        targets = tuple(files[file] for file in self.target_files)
        return replace(self, names=names, source_files=sources, target_files=targets)


def transfer_of(names: tuple[str, ...], listed: Sequence[Block]) -> Transfer:
    """What a transfer of some bands reads and writes."""
    size_bytes = 0
    target_bytes: dict[str, int] = {}
    pieces: dict[tuple[str, ...], int] = {}
    stretches: list[tuple[tuple[int, ...], int]] = []
    for band in listed:
        of_band = dict.fromkeys(tuple(view.file for view in copy.sources) for copy in band)
        read = tuple(pieces.setdefault(files, len(pieces)) for files in of_band)
        for copy in band:
            copy_bytes = copy.targets[0].size_bytes
            size_bytes += copy_bytes
            for view in copy.targets:
                target_bytes[view.file] = target_bytes.get(view.file, 0) + copy_bytes
        if stretches and stretches[-1][0] == read:
            stretches.pop()
        stretches.append((read, size_bytes))
    return Transfer(
        names=names,
        size_bytes=size_bytes,
        source_files=tuple(pieces),
        target_files=tuple(target_bytes),
        target_bytes=tuple(target_bytes.values()),
        stretches=tuple(stretches),
    )


@dataclass(frozen=True)
class Stored:
    """The regions of a tensor at both ends, and those of what is stored behind its last row."""

    source: Sequence[Region]
    target: Sequence[Region]
    source_padding: Sequence[Region]
    target_padding: Sequence[Region]


def stored(ends: Ends, name: str) -> Stored:
    """Where a tensor lies at both ends."""
    source, target = ends.source, ends.target
    return Stored(source.regions(name), target.regions(name), source.padding(name), target.padding(name))


def bands(ends: Ends, names: Sequence[str]) -> list[Block]:
    """The copies of some tensors, those together whose rows are parts of one stored row.

    In the order of the shards, of the source or else of the target, and in those by place.
    """
    return bands_of(ends, [stored(ends, name) for name in names])


def bands_of(ends: Ends, listed: Iterable[Stored]) -> list[Block]:
    """The same of tensors whose regions are known."""
    found: list[Block] = []
    for together in _paired(listed, _take_turns):
        one = together[0]
        found += _common_bands(one.source, one.target) if len(together) == 1 else _bands_in_turn(together)
        found += (band for one in together for band in _bands_of_padding(one, repeats=ends.repeat_last_row))

    def place(band: Block) -> tuple[str, int]:
        view = (band[0].sources if ends.source.is_owned else band[0].targets)[0]
        return view.file, view.offset_bytes

    return [tuple(copy for band in pair for copy in band) for pair in _paired(sorted(found, key=place), _alternate)]


_Item = TypeVar("_Item")


def _paired(listed: Iterable[_Item], belong: Callable[[_Item, _Item], bool]) -> Iterator[list[_Item]]:
    """Each alone, but for two that follow each other and belong together."""
    before: list[_Item] = []
    for one in listed:
        if before and belong(before[0], one):
            yield [*before, one]
            before = []
            continue
        if before:
            yield before
        before = [one]
    if before:
        yield before


def _take_turns(first: Stored, second: Stored) -> bool:
    """Whether the rows of two tensors take turns in the target."""
    return in_turn([*first.target[0].replicas, *second.target[0].replicas]) is not None


def _alternate(band: Block, other: Block) -> bool:
    """Whether the rows of two copies alternate in a stored tensor: together they are a read or write without gaps."""
    if len(band) != 1 or len(other) != 1:
        return False
    (first,), (second,) = band, other
    sides = ((first.sources, second.sources), (first.targets, second.targets))
    is_cast_alike = (first.add, first.targets[0].dtype) == (second.add, second.targets[0].dtype)
    return is_cast_alike and any(
        len(views) == len(others)
        and all(alternating(left, right) is not None for left, right in zip(views, others, strict=True))
        for views, others in sides
    )


@dataclass(frozen=True)
class _Common:
    """What a region of the source and one of the target have in common."""

    box: Box
    source: Region
    target: Region

    @property
    def is_wide(self) -> bool:
        """Whether a row of it is only a part of a stored row, on either side."""
        return self.box.columns < max(self.source.box.columns, self.target.box.columns)

    def copy_of(self, box: Box) -> Copy:
        """The copy of a part of it, counted from the tensor."""
        return Copy(self.source.window(box), self.target.window(box), self.source.add - self.target.add)


def _intersection(source: Sequence[Region], target: Sequence[Region]) -> Iterator[_Common]:
    """Both are in the order of their rows, so that what lies above a region need not be looked at again.

    Raises:
        PlanError: they are not, and copies would be missed.
    """
    for before, after in (pair for regions in (source, target) for pair in pairwise(regions)):
        if before.box.row > after.box.row:
            raise PlanError("regions are not in the order of their rows", expected=before.box, found=after.box)
    first = 0
    for want in target:
        while first < len(source) and source[first].box.row_end <= want.box.row:
            first += 1
        for have in source[first:]:
            if have.box.row >= want.box.row_end:
                break
            box = intersect(want.box, have.box)
            if box is not None and want.replicas and have.replicas:
                yield _Common(box, have, want)


def _common_bands(source: Sequence[Region], target: Sequence[Region]) -> Iterator[Block]:
    found = list(_intersection(source, target))
    yield from ((common.copy_of(common.box),) for common in found if not common.is_wide)
    wide = [common for common in found if common.is_wide]
    borders = sorted({row for common in wide for row in (common.box.row, common.box.row_end)})
    for first, end in pairwise(borders):
        listed: list[list[_Common]] = []
        within = [common for common in wide if common.box.row < end and first < common.box.row_end]
        for common in sorted(within, key=lambda common: common.box.column):
            last = listed[-1][-1] if listed else None
            if last is None or (last.source is not common.source and last.target is not common.target):
                listed.append([])
            listed[-1].append(common)
        for band in listed:
            yield tuple(one.copy_of(replace(one.box, row=first, rows=end - first)) for one in band)


def _bands_in_turn(listed: Sequence[Stored]) -> Iterator[Block]:
    """The copies of tensors whose rows take turns in the target, cut alike, those together that one write needs."""
    found = [common for one in listed for common in _intersection(one.source, one.target)]
    rows = sorted({row for common in found for row in (common.box.row, common.box.row_end)})
    columns = sorted({column for common in found for column in (common.box.column, common.box.column_end)})
    for (first, end), (left, right) in product(pairwise(rows), pairwise(columns)):
        box = Box(first, left, end - first, right - left)
        yield tuple(common.copy_of(box) for common in found if intersect(common.box, box))


def _bands_of_padding(one: Stored, *, repeats: bool) -> Iterator[Block]:
    """The source's padding as far as both sides have it; behind it the tensor's last row, or zeros."""
    if not one.target_padding:
        return
    yield from _common_bands(one.source_padding, one.target_padding)
    last = max(region.box.row_end for region in one.source) - 1
    end = max((region.box.row_end for region in one.source_padding), default=0)
    for want in one.target_padding if repeats else ():
        first = max(end, want.box.row)
        rows = want.box.row_end - first
        for have in one.source if rows > 0 else ():
            box = intersect(replace(want.box, row=last, rows=1), have.box)
            if box is not None and have.replicas:
                row = tuple(view.with_row_stride(rows, 0) for view in have.window(box))
                yield (Copy(row, want.window(replace(box, row=first, rows=rows)), have.add - want.add),)


def part_of(block: Block, files: Collection[str]) -> Block:
    """What goes into some files, which may be nothing."""
    kept = (copy.into(files) for copy in block)
    return tuple(copy for copy in kept if copy.targets)


def blocks_of_band(band: Block, files: Collection[str]) -> Iterator[Block]:
    """One of the `bands` cut into blocks of about `BLOCK_BYTES`: copies that make up whole rows stay together.

    Blocks have only what goes into some files; their borders are those of the whole band.

    Raises:
        PlanError: a row is larger than a block.
    """
    is_transposed = any(view.is_transposed for copy in band for view in (*copy.sources, *copy.targets))
    for block in _square_tiles(band) if is_transposed else _row_blocks(band):
        if kept := part_of(block, files):
            yield kept


def _square_tiles(band: Block) -> Iterator[Block]:
    # One write needs those whose rows take turns.
    together = [band] if in_turn([copy.targets[0] for copy in band]) else [(copy,) for copy in band]
    for copies in together:
        rows, columns, item_bytes = copies[0].rows, copies[0].columns, max(map(_widest_bytes, copies)) * len(copies)
        for tile in block_tiles(rows, columns, item_bytes, BLOCK_BYTES, is_transposed=True):
            yield tuple(copy.window(tile) for copy in copies)


def _row_blocks(band: Block) -> Iterator[Block]:
    row_bytes = sum(copy.columns for copy in band) * max(map(_widest_bytes, band))
    if row_bytes > BLOCK_BYTES:
        what, expected = "a row is larger than a block", f"at most {BLOCK_BYTES} bytes"
        raise PlanError(what, tensor=band[0].targets[0].tensor, expected=expected, found=f"{row_bytes} bytes")
    for tile in tiles(band[0].rows, 1, BLOCK_BYTES // row_bytes, 1):
        yield tuple(copy.window(Box(tile.row, 0, tile.rows, copy.columns)) for copy in band)


def _widest_bytes(copy: Copy) -> int:
    """Of one element."""
    return max(DTYPE_BYTES[view.dtype] for view in (*copy.sources, *copy.targets))
