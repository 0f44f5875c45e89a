"""A conversion is the intersection of two catalogs: all box copies of each tensor, and the bands that are cut together.

Copies are expanded when they are needed, and never all at once: a model of 256 experts has hundreds of thousands. What
is kept of them is a `Transfer` for each group of tensors that lie in one stored tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dist_convert.errors import ConversionError, PlanError, raise_together
from dist_convert.models.catalog import Catalog, Region
from dist_convert.records import DTYPE_BYTES, Block, Box, Copy, TargetFile, View, cover_fault, intersect, tiles

#: Bytes of one block. Fixed, so that results never depend on ranks or budget.
BLOCK_BYTES = 4 << 20

#: Columns of a tile where source and target lie transposed to each other: runs of 2 KiB on both sides.
_TILE_COLUMNS = 1024


@dataclass(frozen=True)
class Ends:
    """Both ends of a conversion.

    Attributes:
        source, target: their catalogs, of the same tensors.
        repeat_last_row: fill the target's padding rows with the last row of the tensor, not with zeros.
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
        written_bytes: the same, counting every equal target.
        source_files: for each piece of the source, the files that hold it (equal copies).
        target_files: the files that are written to.
        target_bytes: how much, for each of these.
        needs: sets of files; ranks can do the transfer together if they reach one file of each.
        stretches: up to which byte each piece of the source goes, with its number in `source_files`.
        crosses: a row of a band lies in several pieces of the source.
        own_targets: sets as in `needs`, of target files that not every rank can write.
        is_part: others write the same tensors to further files; this one has what goes to `target_files`.
    """

    names: tuple[str, ...]
    size_bytes: int
    written_bytes: int
    source_files: tuple[tuple[str, ...], ...]
    target_files: tuple[str, ...]
    target_bytes: tuple[int, ...]
    needs: tuple[tuple[str, ...], ...]
    stretches: tuple[tuple[int, int], ...]
    crosses: bool
    own_targets: tuple[tuple[str, ...], ...] = ()
    is_part: bool = False

    @property
    def all_needs(self) -> tuple[tuple[str, ...], ...]:
        """All that ranks must reach to do the transfer."""
        return (*self.needs, *self.own_targets)


@dataclass(frozen=True)
class _Common:
    """What a region of the source and one of the target have in common: its box, and the copy."""

    box: Box
    copy: Copy
    source: Region
    target: Region

    @property
    def is_wide(self) -> bool:
        """Whether a row of it is only a part of a stored row, on either side."""
        return self.box.columns < max(self.source.box.columns, self.target.box.columns)

    def rows(self, first: int, end: int) -> _Common:
        """Some of its rows, counted from the tensor."""
        window = Box(first - self.box.row, 0, end - first, self.box.columns)
        return replace(
            self, box=Box(first, self.box.column, end - first, self.box.columns), copy=self.copy.window(window)
        )


def _window(region: Region, box: Box) -> tuple[View, ...]:
    inside = Box(box.row - region.box.row, box.column - region.box.column, box.rows, box.columns)
    return tuple(view.window(inside) for view in region.replicas)


def _intersection(source: Sequence[Region], target: Sequence[Region]) -> Iterator[_Common]:
    """Both are in the order of their rows, so that what lies above a region need not be looked at again."""
    first = 0
    for want in target:
        while first < len(source) and source[first].box.row_end <= want.box.row:
            first += 1
        for have in source[first:]:
            if have.box.row >= want.box.row_end:
                break
            box = intersect(want.box, have.box)
            if box is not None and want.replicas and have.replicas:
                yield _Common(box, Copy(_window(have, box), _window(want, box), have.add - want.add), have, want)


#: The regions of a tensor at both ends.
_Both = tuple[Sequence[Region], Sequence[Region]]


def _regions(ends: Ends, name: str) -> _Both:
    return ends.source.regions(name), ends.target.regions(name)


def bands(ends: Ends, names: Sequence[str]) -> list[Block]:
    """The copies of some tensors, those together whose rows are parts of one stored row.

    In the order of the shards, of the source or else of the target, and in those by place.
    """
    return _bands(ends, {name: _regions(ends, name) for name in names})


def _bands(ends: Ends, regions: Mapping[str, _Both]) -> list[Block]:
    found = [band for both in regions.values() for band in _bands_of_tensor(both)]
    found += [band for name, (source, _) in regions.items() for band in _bands_of_padding(ends, name, source)]
    if ends.source.is_owned:
        return sorted(found, key=lambda band: (band[0].sources[0].file, band[0].sources[0].offset_bytes))
    return sorted(found, key=lambda band: (band[0].targets[0].file, band[0].targets[0].offset_bytes))


def _bands_of_tensor(both: _Both) -> Iterator[Block]:
    found = list(_intersection(*both))
    yield from ((common.copy,) for common in found if not common.is_wide)
    wide = [common for common in found if common.is_wide]
    borders = sorted({row for common in wide for row in (common.box.row, common.box.row_end)})
    for first, end in pairwise(borders):
        band: list[_Common] = []
        within = [common.rows(first, end) for common in wide if common.box.row < end and first < common.box.row_end]
        for common in sorted(within, key=lambda common: common.box.column):
            if band and band[-1].source is not common.source and band[-1].target is not common.target:
                yield tuple(one.copy for one in band)
                band = []
            band.append(common)
        if band:
            yield tuple(one.copy for one in band)


def _bands_of_padding(ends: Ends, name: str, source: Sequence[Region]) -> Iterator[Block]:
    """The source's padding as far as both sides have it; behind it the tensor's last row, or zeros."""
    wanted = ends.target.padding(name)
    if not wanted:
        return
    known = ends.source.padding(name)
    yield from _bands_of_tensor((known, wanted))
    if ends.repeat_last_row:
        end = max((region.box.row_end for region in known), default=0)
        beyond = [_rows_from(want, end) for want in wanted if want.box.row_end > end]
        yield from ((copy,) for copy in _repeated_rows(ends, name, source, beyond))


def _rows_from(region: Region, first: int) -> Region:
    """What of a region lies at a row of the tensor or below it."""
    row = max(first, region.box.row)
    box = replace(region.box, row=row, rows=region.box.row_end - row)
    return replace(region, box=box, replicas=_window(region, box))


def _repeated_rows(ends: Ends, name: str, source: Sequence[Region], wanted: Sequence[Region]) -> Iterator[Copy]:
    """The tensor's last row for each row of padding."""
    last = ends.source.tensors[name].rows - 1
    for want in wanted:
        for have in (region for region in source if region.box.row_end > last and region.replicas):
            row = replace(have.box, row=last, rows=1)
            box = intersect(replace(want.box, row=last, rows=1), row)
            if box is not None:
                repeated = tuple(replace(v, rows=want.box.rows, row_stride=0) for v in _window(have, box))
                columns = replace(box, row=want.box.row, rows=want.box.rows)
                yield Copy(repeated, _window(want, columns), have.add - want.add)


@dataclass(frozen=True)
class Planned:
    """All that is copied: transfers in the order of the tensors, a digest of their copies, and what stays zero."""

    transfers: tuple[Transfer, ...]
    digest: str
    zero_tensors: tuple[str, ...]


def plan_transfers(ends: Ends, files: Sequence[TargetFile], extras: frozenset[tuple[str, str]]) -> Planned:
    """Intersect both ends, and check that every element of the target is written once.

    Args:
        ends: both ends.
        files: the target's weights files.
        extras: (file, tensor) of the target that are filled with something else.

    Raises:
        Problems, or the one problem there is: tensors that one end lacks, of other shapes, or not covered exactly.
    """
    raise_together(list(_unpaired(ends)))
    problems: list[ConversionError] = []
    transfers: list[Transfer] = []
    zeros: list[str] = []
    digest = hashlib.sha256()
    filled: dict[tuple[str, str], int] = {}
    waiting: dict[str, _Both] = {}
    together: set[tuple[str, str]] = set()
    for name in ends.target.tensors:
        both = _regions(ends, name)
        problems += _cover_problems(ends, name, both)
        for region in (*both[1], *ends.target.padding(name)):
            for view in region.replicas:
                filled[view.file, view.tensor] = filled.get((view.file, view.tensor), 0) + region.box.elements
        stored = {(side[0].replicas[0].file, side[0].replicas[0].tensor) for side in both if side[0].replicas}
        if together.isdisjoint(stored):
            transfers += _transfers_of(ends, waiting, digest)
            waiting = {}
        waiting[name] = both
        together = stored
        if both[1][0].replicas and not both[0][0].replicas:
            zeros.append(name)
    problems += _unfilled(files, filled, extras)
    raise_together(problems)
    transfers += _transfers_of(ends, waiting, digest)
    return Planned(tuple(transfers), digest.hexdigest(), tuple(zeros))


def _unfilled(
    files: Sequence[TargetFile], filled: Mapping[tuple[str, str], int], extras: frozenset[tuple[str, str]]
) -> Iterator[ConversionError]:
    """Stored tensors of which some element belongs to no region, or to two."""
    for file in files:
        for tensor in file.tensors:
            key = (file.name, tensor.name)
            if key not in extras and filled.get(key, 0) != tensor.elements:
                yield PlanError(
                    "nothing fills a tensor of the target",
                    tensor=tensor.name,
                    file=file.name,
                    expected=f"{tensor.elements} elements",
                    found=filled.get(key, 0),
                )


def _unpaired(ends: Ends) -> Iterator[ConversionError]:
    """Tensors that are not the same at both ends."""
    source, target = ends.source.tensors, ends.target.tensors
    for name in [*source, *(name for name in target if name not in source)]:
        shapes = [list(side[name].shape) if name in side else "no such tensor" for side in (source, target)]
        if shapes[0] != shapes[1]:
            yield PlanError("a tensor is not the same at both ends", tensor=name, expected=shapes[0], found=shapes[1])


def _cover_problems(ends: Ends, name: str, both: _Both) -> Iterator[ConversionError]:
    """Regions that do not cover the tensor exactly once."""
    for side, regions in zip((ends.source, ends.target), both, strict=True):
        meta = side.tensors[name]
        fault = cover_fault((region.box for region in regions), meta.rows, meta.columns)
        if fault is not None:
            file = next((view.file for region in regions for view in region.replicas), "")
            yield PlanError("the plan does not cover a tensor exactly", tensor=name, file=file, found=fault)


def _transfers_of(ends: Ends, regions: Mapping[str, _Both], digest: hashlib._Hash) -> list[Transfer]:
    """The transfer of tensors that lie together; none where nothing of them is stored."""
    listed = _bands(ends, regions)
    if not listed:
        return []
    digest.update(repr((*regions, listed)).encode())
    return [transfer_of(ends, tuple(regions), listed)]


def transfer_of(ends: Ends, names: tuple[str, ...], listed: Sequence[Block]) -> Transfer:
    """What a transfer of some bands needs and moves."""
    size_bytes = 0
    target_bytes: dict[str, int] = {}
    pieces: dict[tuple[str, ...], int] = {}
    stretches: list[tuple[int, int]] = []
    crosses = False
    for band in listed:
        of_band = dict.fromkeys(tuple(view.file for view in copy.sources) for copy in band)
        numbers = [pieces.setdefault(files, len(pieces)) for files in of_band]
        crosses |= len(numbers) > 1
        for copy in band:
            copy_bytes = copy.targets[0].size_bytes
            size_bytes += copy_bytes
            for view in copy.targets:
                target_bytes[view.file] = target_bytes.get(view.file, 0) + copy_bytes
        if stretches and stretches[-1][0] == numbers[0]:
            stretches[-1] = (numbers[0], size_bytes)
        else:
            stretches.append((numbers[0], size_bytes))
    needs = tuple(pieces) + tuple((file,) for file in target_bytes if ends.target.is_owned)
    return Transfer(
        names=names,
        size_bytes=size_bytes,
        written_bytes=sum(target_bytes.values()),
        source_files=tuple(pieces),
        target_files=tuple(target_bytes),
        target_bytes=tuple(target_bytes.values()),
        needs=needs,
        stretches=tuple(stretches) if ends.source.is_owned and not crosses else ((0, size_bytes),),
        crosses=crosses,
    )


def part_of(transfer: Transfer, band: Block) -> Block:
    """What a transfer has of a band or block of the whole one, which may be nothing."""
    if not transfer.is_part:
        return band
    kept = (copy.into(transfer.target_files) for copy in band)
    return tuple(copy for copy in kept if copy.targets)


def blocks_of_band(transfer: Transfer, band: Block) -> Iterator[Block]:
    """One of a transfer's `bands` cut into blocks of about `BLOCK_BYTES`: copies that make up whole rows stay together.

    The blocks of a part of a transfer are those of the whole, with fewer targets: their borders are the same.
    """
    for block in _blocks_of_whole(band):
        if kept := part_of(transfer, block):
            yield kept


def _blocks_of_whole(band: Block) -> Iterator[Block]:
    if any(view.is_transposed for copy in band for view in (*copy.sources, *copy.targets)):
        yield from ((copy.window(tile),) for copy in band for tile in _square_tiles(copy))
    else:
        yield from _row_blocks(band)


def _square_tiles(copy: Copy) -> Iterator[Box]:
    columns = min(copy.columns, _TILE_COLUMNS)
    row_bytes = columns * _widest_item_bytes(copy)
    return tiles(copy.rows, copy.columns, max(1, BLOCK_BYTES // row_bytes), columns)


def _row_blocks(band: Block) -> Iterator[Block]:
    columns = sum(copy.columns for copy in band)
    row_bytes = columns * max(_widest_item_bytes(copy) for copy in band)
    if row_bytes > BLOCK_BYTES:
        raise PlanError(
            "a row is larger than a block",
            tensor=band[0].targets[0].tensor,
            expected=f"at most {BLOCK_BYTES} bytes",
            found=f"{row_bytes} bytes",
        )
    for tile in tiles(band[0].rows, 1, BLOCK_BYTES // row_bytes, 1):
        yield tuple(copy.window(Box(tile.row, 0, tile.rows, copy.columns)) for copy in band)


def _widest_item_bytes(copy: Copy) -> int:
    return max(DTYPE_BYTES[view.dtype] for view in (*copy.sources, *copy.targets))
