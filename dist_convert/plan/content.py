"""What is converted into what, byte by byte, whoever does it: the intersection of both ends' catalogs.

Pure: integers and strings, no torch, no files, no process groups.

Layers and experts repeat each other: what follows from where a tensor lies at both ends is worked out once for all
whose boxes, strides, distances in a file and order of files are the same (a `_Geometry`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from dist_convert.errors import ConversionError, PlanError, raise_together
from dist_convert.models.catalog import Catalog, LeftBehind, Region
from dist_convert.plan.copies import Ends, Stored, Transfer, bands_of, stored, transfer_of
from dist_convert.records import JsonObject, TargetFile, View, counted, cover_fault, human_bytes, names

#: So many are remembered: where chunks are spread over files at random, no two tensors lie alike.
_MOST_GEOMETRIES = 1024


@dataclass(frozen=True)
class Content:
    """A conversion without its division over ranks.

    Attributes:
        ends: both ends' catalogs.
        files: the target's weights files.
        transfers: what is copied, in the order of the tensors.
        digest: names what is converted into what: the same for any number of ranks, placement and budget.
        target_dtype: what the dtype of most of the source becomes; tensors of other dtypes keep theirs. None keeps all.
        left_behind: what is not converted on purpose.
        zero_tensors: names of target tensors that stay zero.
    """

    ends: Ends
    files: tuple[TargetFile, ...]
    transfers: tuple[Transfer, ...]
    digest: str
    target_dtype: str | None = None
    left_behind: LeftBehind = ()
    zero_tensors: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The model and the grid, for people."""
        return (self.ends.target if self.ends.target.is_owned else self.ends.source).title

    @property
    def target_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def moved_bytes(self) -> int:
        return sum(transfer.written_bytes for transfer in self.transfers)


def plan_content(
    source: Catalog,
    target: Catalog,
    files: Sequence[TargetFile],
    *,
    target_dtype: str | None = None,
    left_behind: LeftBehind = (),
    repeat_last_row: bool = False,
    extras: frozenset[tuple[str, str]] = frozenset(),
) -> Content:
    """Work out every byte that is to be read and written, and check that every element is written once.

    Args:
        target_dtype, left_behind: see `Content`.
        repeat_last_row: fill padding rows of the vocabulary with the last real one, not with zeros.
        extras: (file, tensor) of the target that are filled with something else than weights.

    Raises:
        Problems, or the one problem there is: tensors that one end lacks, of other shapes, or not covered exactly;
        nothing fills a tensor of the target.
    """
    ends = Ends(source, target, repeat_last_row)
    raise_together(list(_unpaired(ends)))
    problems = []
    transfers = []
    zeros = []
    filled = Counter[tuple[str, str]]()
    known: dict[Hashable, _Geometry] = {}
    copies = hashlib.sha256()
    for together in _stored_together(ends):
        key, places, first_bytes = _described(ends, together)
        geometry = known.get(key)
        if geometry is None:
            if len(known) == _MOST_GEOMETRIES:
                known.clear()
            geometry = known[key] = _worked_out(ends, together, key, places, tuple(first_bytes))
        if geometry.transfer:
            files_now = dict(zip(geometry.files, first_bytes, strict=True))
            transfers.append(geometry.transfer.renamed(tuple(together), files_now))
        copies.update(repr((geometry.digest, *together, *places, *first_bytes.values())).encode())
        for place, elements in zip(places, geometry.filled, strict=True):
            filled[place] += elements
        for (name, one), faults in zip(together.items(), geometry.faults, strict=True):
            for fault, regions in zip(faults, (one.source, one.target), strict=True):
                if fault is not None:
                    file = next((view.file for region in regions for view in region.replicas), "")
                    what = "the plan does not cover a tensor exactly"
                    problems.append(PlanError(what, file, tensor=name, found=fault))
            if one.target[0].replicas and not one.source[0].replicas:
                zeros.append(name)
    raise_together([*problems, *_unfilled(files, filled, extras)])
    named = {
        "architecture": asdict(target.architecture),
        "copies": copies.hexdigest(),
        "repeat_last_row": repeat_last_row,
        "target": [[file.name, file.size_bytes, hashlib.sha256(file.header).hexdigest()] for file in files],
    }
    return Content(ends, tuple(files), tuple(transfers), digest(named), target_dtype, left_behind, tuple(zeros))


def digest(data: JsonObject) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unpaired(ends: Ends) -> Iterator[ConversionError]:
    """Tensors that are not the same at both ends."""
    source, target = ends.source.tensors, ends.target.tensors
    for name in [*source, *(name for name in target if name not in source)]:
        shapes = [list(side[name].shape) if name in side else "no such tensor" for side in (source, target)]
        if shapes[0] != shapes[1]:
            yield PlanError("a tensor is not the same at both ends", tensor=name, expected=shapes[0], found=shapes[1])


def _stored_together(ends: Ends) -> Iterator[dict[str, Stored]]:
    """All tensors, those together that follow each other and share a stored tensor at either end."""
    together: dict[str, Stored] = {}
    shared = set[tuple[str, str]]()
    for name in ends.target.tensors:
        one = stored(ends, name)
        firsts = [regions[0].replicas[0] for regions in (one.source, one.target) if regions[0].replicas]
        places = {(view.file, view.tensor) for view in firsts}
        if together and shared.isdisjoint(places):
            yield together
            together = {}
        together[name], shared = one, places
    yield together


@dataclass(frozen=True)
class _Geometry:
    """What follows from where tensors that are stored together lie, whatever they and their files are called.

    Attributes:
        files: of the first of them, in the order in which they are met.
        transfer: of their copies, from and to these files; None where nothing is copied.
        filled: elements of the target that regions fill, by number of the stored tensor.
        faults: for each tensor, why its regions do not cover it once, at the source and at the target.
        digest: of the shapes, boxes, distances and strides.
    """

    files: tuple[str, ...]
    transfer: Transfer | None
    filled: tuple[int, ...]
    faults: tuple[tuple[str | None, ...], ...]
    digest: str


def _described(
    ends: Ends, together: Mapping[str, Stored]
) -> tuple[Hashable, dict[tuple[str, str], int], dict[str, int]]:
    """Where tensors lie, in three parts: first what those of other layers and experts may have in common with them.

    Returns:
        Shapes, boxes, distances from the first byte in a file, strides, and how the files are sorted; the numbers of
        the stored tensors, by file and name; the first byte in each file.
    """
    numbers: dict[tuple[str, str], int] = {}
    firsts: dict[str, int] = {}

    def place(view: View) -> tuple[Hashable, ...]:
        number = numbers.setdefault((view.file, view.tensor), len(numbers))
        begin = view.offset_bytes - firsts.setdefault(view.file, view.offset_bytes)
        found = number, begin, (view.dtype, view.rows, view.columns, view.row_stride, view.column_stride)
        if (by := view.scales) is None:
            return found
        return *found, *place(by.first), by.block_rows, by.block_columns, by.packed, by.row, by.column

    def described(regions: Sequence[Region]) -> Hashable:
        return tuple(
            (
                (region.box.row, region.box.column, region.box.rows, region.box.columns, region.add),
                tuple(map(place, region.replicas)),
            )
            for region in regions
        )

    shapes = [ends.target.tensors[name].shape for name in together]
    boxes = [
        tuple(map(described, (one.source, one.target, one.source_padding, one.target_padding)))
        for one in together.values()
    ]
    order = {file: number for number, file in enumerate(sorted(firsts))}
    return (*shapes, *boxes, *(order[file] for file, _ in numbers)), numbers, firsts


def _worked_out(
    ends: Ends,
    together: Mapping[str, Stored],
    key: Hashable,
    numbers: Mapping[tuple[str, str], int],
    files: tuple[str, ...],
) -> _Geometry:
    filled = [0] * len(numbers)
    faults = []
    for name, one in together.items():
        for region in (*one.target, *one.target_padding):
            for view in region.replicas:
                filled[numbers[view.file, view.tensor]] += region.box.elements
        meta = ends.target.tensors[name]
        sides = (one.source, one.target)
        faults.append(tuple(cover_fault((r.box for r in regions), meta.rows, meta.columns) for regions in sides))
    listed = [] if any(map(any, faults)) else bands_of(ends, together.values())
    transfer = transfer_of((), listed) if listed else None
    return _Geometry(files, transfer, tuple(filled), tuple(faults), hashlib.sha256(repr(key).encode()).hexdigest())


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
                    file.name,
                    tensor=tensor.name,
                    expected=f"{tensor.elements} elements",
                    found=filled.get(key, 0),
                )


def notes_on_content(content: Content) -> list[str]:
    """What is rounded, kept as it is and left behind, a line each, in either direction."""
    notes = []
    stored_dtype = content.ends.source.params_dtype
    moved = {name for transfer in content.transfers for name in transfer.names}
    kept = [name for name, one in content.ends.source.tensors.items() if name in moved and one.dtype != stored_dtype]
    if content.target_dtype and content.target_dtype != stored_dtype:
        notes.append(
            f"weights are stored in {stored_dtype} and become {content.target_dtype} "
            "(--target-params-dtype keep leaves them as they are)"
        )
    if content.target_dtype and kept:
        notes.append(f"{counted(len(kept), 'tensor')} kept in a dtype other than {stored_dtype}: {names(kept)}")
    for reason, count, size_bytes in content.left_behind:
        notes.append(f"not converted: {count} x {reason}, {human_bytes(size_bytes)}")
    return notes
