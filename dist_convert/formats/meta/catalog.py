"""Meta's files as a catalog: of each matrix a file has some rows or some columns, and every file has all norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dist_convert.errors import (
    ConversionError,
    MissingTensor,
    UnknownTensor,
    WrongShape,
    raise_together,
)
from dist_convert.formats.megatron.parameters import dtype_problems
from dist_convert.formats.meta.names import DROPPED, HEAD, NAMES, ROTATED
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import LeftBehind, Region, TensorMeta
from dist_convert.models.rotary import from_neighbours
from dist_convert.models.schema import Architecture, entries, part_shape, parts_of
from dist_convert.records import Box, StoredTensor, View

#: For each file, its tensors by name.
Headers = Mapping[str, Mapping[str, StoredTensor]]


@dataclass(frozen=True)
class MetaCatalog:
    """A `Catalog` of Meta's files.

    Attributes:
        architecture, tensors: the model, and the logical tensors.
        stored: their regions, with the rows in Meta's order.
        rotated: names of those whose heads' rows are in another order.
        files: how many there are.
    """

    architecture: Architecture
    tensors: Mapping[str, TensorMeta]
    stored: Mapping[str, tuple[Region, ...]]
    rotated: frozenset[str]
    files: int

    @property
    def title(self) -> str:
        files = "1 file" if self.files == 1 else f"{self.files} files"
        return f"{FAMILIES[self.architecture.family].hf_class}, Meta's layout in {files}"

    @property
    def params_dtype(self) -> str:
        return next(iter(self.tensors.values())).dtype

    @property
    def kept_dtypes(self) -> dict[str, str]:
        return {name: meta.dtype for name, meta in self.tensors.items() if meta.dtype != self.params_dtype}

    @property
    def is_owned(self) -> bool:
        return True

    def regions(self, name: str) -> Sequence[Region]:
        """See `Catalog`."""
        stored = self.stored[name]
        return from_neighbours(stored, self.architecture.head_dim) if name in self.rotated else stored

    def padding(self, name: str) -> Sequence[Region]:
        """See `Catalog`."""
        return ()

    def copies(self) -> dict[str, tuple[View, ...]]:
        """The tensors that every one of several files has."""
        found = {name: regions[0].replicas for name, regions in self.stored.items()}
        return {name: views for name, views in found.items() if len(views) > 1}

    def with_first(self, names: Sequence[str]) -> MetaCatalog:
        """The same with the first file's copy of some tensors alone."""
        first = {name: (replace(self.stored[name][0], replicas=self.stored[name][0].replicas[:1]),) for name in names}
        return replace(self, stored={**self.stored, **first})


def open_catalog(headers: Headers, architecture: Architecture) -> tuple[MetaCatalog, LeftBehind]:
    """A model from the headers of its files, and what of it is no part of the model.

    Raises:
        Problems, or the one problem there is: tensors that are missing, unknown, misshapen or no floats.
    """
    family, sizes = FAMILIES[architecture.family], architecture.sizes()
    tensors: dict[str, TensorMeta] = {}
    stored: dict[str, tuple[Region, ...]] = {}
    rotated, used = set[str](), {DROPPED} | ({HEAD} if architecture.tied else set())
    problems: list[ConversionError] = []
    listed = ((part, layer) for entry, layer, _ in entries(family, architecture) for part in parts_of(entry))
    for part, layer in listed:
        name, theirs = part.name.format(layer=layer), NAMES[part.name].format(layer=layer)
        used.add(theirs)
        missing = [file for file, found in headers.items() if theirs not in found]
        if missing:
            remedy = "the file is incomplete or of another model; copy it again"
            problems.append(MissingTensor(f"no tensor for {name}", tensor=theirs, file=missing[0], remedy=remedy))
            continue
        pieces, shape = [found[theirs] for found in headers.values()], part_shape(part, sizes)
        regions = _regions(pieces, shape)
        if not regions:
            problems.append(
                WrongShape(
                    f"the files do not make up {name}",
                    tensor=theirs,
                    file=pieces[0].file,
                    expected=f"{list(shape)} in all {len(pieces)} together",
                    found=", ".join(str(list(piece.shape)) for piece in pieces),
                    remedy="a file is missing, or of another model: copy all of them again",
                )
            )
            continue
        views = [view for region in regions for view in region.replicas]
        problems += [problem for view in views for problem in dtype_problems(view, views[0].dtype)]
        tensors[name], stored[name] = TensorMeta(shape, views[0].dtype, part.dtype), regions
        if part.name in ROTATED:
            rotated.add(name)
    for file, held in headers.items():
        for name in sorted(held.keys() - used):
            expected, remedy = f"only the weights of a {family.hf_class}", "nothing is dropped silently"
            what = f"{name} has no place in a {family.name} model"
            problems.append(UnknownTensor(what, tensor=name, file=file, expected=expected, remedy=remedy))
    raise_together(problems)
    reasons = {DROPPED: "rotary frequencies"} | (
        {HEAD: "output layer (equal to the embedding)"} if architecture.tied else {}
    )
    dropped = {reason: [held[name] for held in headers.values() if name in held] for name, reason in reasons.items()}
    left_behind = tuple(
        (reason, len(found), sum(one.size_bytes for one in found)) for reason, found in dropped.items() if found
    )
    return MetaCatalog(architecture, tensors, stored, frozenset(rotated), len(headers)), left_behind


def _regions(pieces: Sequence[StoredTensor], shape: tuple[int, ...]) -> tuple[Region, ...]:
    """The regions of a tensor: a vector is whole in every file, a matrix cut by rows or columns, as the shapes tell.

    There are none where the pieces do not make it up.
    """
    if any(len(piece.shape) != len(shape) or not piece.elements for piece in pieces):
        return ()
    views = [View.of(piece) for piece in pieces]
    if len(shape) == 1:
        is_whole = all(view.rows == shape[0] for view in views)
        return (Region(Box(0, 0, shape[0], 1), tuple(views)),) if is_whole else ()
    (rows, columns), found, end = shape, list[Region](), 0
    by_rows = all(view.columns == columns for view in views)
    for view in views:
        row, column = (end, 0) if by_rows else (0, end)
        found.append(Region(Box(row, column, view.rows, view.columns), (view,)))
        end += view.rows if by_rows else view.columns
    fits = end == rows if by_rows else end == columns and all(view.rows == rows for view in views)
    return tuple(found) if fits else ()
