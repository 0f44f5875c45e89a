"""Meta's files as a catalog: of each matrix a file has some rows or some columns, and every file has all norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_convert.errors import (
    ConversionError,
    WrongShape,
    raise_together,
)
from dist_convert.formats.megatron.parameters import dtype_problems, unknown_tensor
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


def open_catalog(headers: Headers, architecture: Architecture) -> tuple[MetaCatalog, LeftBehind]:
    """A model from the headers of its files, and what of it is no part of the model.

    Raises:
        Problems, or the one problem there is: tensors that are missing, unknown, misshapen or no floats.
    """
    family, sizes = FAMILIES[architecture.family], architecture.sizes()
    tensors: dict[str, TensorMeta] = {}
    stored: dict[str, tuple[Region, ...]] = {}
    left = {DROPPED: "rotary frequencies"}
    left |= {HEAD: "output layer (equal to the embedding that it is tied to)"} if architecture.tied else {}
    rotated, used = set[str](), set(left)
    problems: list[ConversionError] = []
    listed = ((part, layer) for entry, layer, _ in entries(family, architecture) for part in parts_of(entry))
    for part, layer in listed:
        name, theirs = part.name.format(layer=layer), NAMES[part.name].format(layer=layer)
        used.add(theirs)
        pieces, shape = [found[theirs] for found in headers.values() if theirs in found], part_shape(part, sizes)
        regions = _regions(pieces, shape) if len(pieces) == len(headers) else ()
        if not regions:
            problems.append(
                WrongShape(
                    f"the files do not make up {name}",
                    tensor=theirs,
                    file=next((file for file, found in headers.items() if theirs not in found), min(headers)),
                    expected=f"{list(shape)} in all {len(headers)} together",
                    found=", ".join(str(list(piece.shape)) for piece in pieces) or "nothing",
                    remedy="a file is missing, damaged or of another model: copy all of them again",
                )
            )
            continue
        views = [view for region in regions for view in region.replicas]
        problems += [problem for view in views for problem in dtype_problems(view, views[0].dtype)]
        tensors[name], stored[name] = TensorMeta(shape, views[0].dtype, part.dtype), regions
        if part.name in ROTATED:
            rotated.add(name)
    for file, held in headers.items():
        problems += [unknown_tensor(family, file, name) for name in sorted(held.keys() - used)]
    raise_together(problems)
    found = ((reason, [held[name] for held in headers.values() if name in held]) for name, reason in left.items())
    left_behind = tuple((reason, len(some), sum(one.size_bytes for one in some)) for reason, some in found if some)
    return MetaCatalog(architecture, tensors, stored, frozenset(rotated), len(headers)), left_behind


def _regions(pieces: Sequence[StoredTensor], shape: tuple[int, ...]) -> tuple[Region, ...]:
    """The regions of a tensor: a matrix is cut by rows or columns, as the shapes tell, a vector is the first file's.

    There are none where the pieces do not make it up.
    """
    if any(len(piece.shape) != len(shape) or not piece.elements for piece in pieces):
        return ()
    views = tuple(View.of(piece) for piece in pieces)
    if len(shape) == 1:
        return (Region(Box(0, 0, shape[0], 1), views[:1]),) if all(view.rows == shape[0] for view in views) else ()
    (rows, columns), found, end = shape, list[Region](), 0
    by_rows = all(view.columns == columns for view in views)
    for view in views:
        row, column = (end, 0) if by_rows else (0, end)
        found.append(Region(Box(row, column, view.rows, view.columns), (view,)))
        end += view.rows if by_rows else view.columns
    fits = end == rows if by_rows else end == columns and all(view.rows == rows for view in views)
    return tuple(found) if fits else ()
