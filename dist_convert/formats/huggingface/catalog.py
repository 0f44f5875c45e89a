"""A model with Hugging Face's names as a catalog: every tensor lies whole in one file, or in chunks in several."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dist_convert.errors import ConversionError, UnsupportedModel, raise_together
from dist_convert.formats.dcp.chunks import Stored
from dist_convert.formats.huggingface.names import HEAD, hf_view, leftovers
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import LeftBehind, Region, TensorMeta, cut
from dist_convert.models.schema import Architecture, copies_of, entries, part_shape
from dist_convert.records import DTYPE_BYTES, FLOAT_DTYPES, Box, StoredTensor, View, counted


@dataclass(frozen=True)
class HuggingFaceCatalog:
    """A `Catalog` of weights files.

    Attributes:
        architecture, tensors: the model, and the logical tensors.
        views: the places of each tensor as rows x columns.
        optional: names of tensors that another format may have no place for, as they are zeros.
        chunks: of a distributed checkpoint, by the names that views have; their places are then those in whole tensors.
        is_owned: see `Catalog`.
        layout: of the chunks, for people.
    """

    architecture: Architecture
    tensors: Mapping[str, TensorMeta]
    views: Mapping[str, tuple[View, ...]]
    optional: frozenset[str] = frozenset()
    chunks: Mapping[str, Stored] = field(default_factory=dict)
    is_owned: bool = False
    layout: str = "DCP"

    @property
    def title(self) -> str:
        files = {chunk.place.file for tensor in self.chunks.values() for chunk in tensor.chunks}
        where = f"{self.layout} in {counted(len(files), 'file')}" if files else "Hugging Face"
        return f"{FAMILIES[self.architecture.family].hf_class}, {where}"

    @cached_property
    def params_dtype(self) -> str:
        bytes_of = Counter[str]()
        for name, meta in self.tensors.items():
            if name not in self.optional:
                bytes_of[meta.dtype] += meta.box.elements * DTYPE_BYTES[meta.dtype]
        return bytes_of.most_common(1)[0][0]

    def regions(self, name: str) -> Sequence[Region]:
        return regions_of(self.views[name], self.chunks)

    def padding(self, name: str) -> Sequence[Region]:
        return ()


def regions_of(views: Sequence[View], chunks: Mapping[str, Stored]) -> tuple[Region, ...]:
    """Where a tensor lies that these views of equal content hold: as they are, or each in chunks."""
    if not chunks:
        return (Region(Box(0, 0, views[0].rows, views[0].columns), tuple(views)),)
    found, *others = (chunks[view.tensor].regions(view) for view in views)
    for copies in others:
        pairs = [(region, copy) for region in found for copy in cut(copies, region.box)]
        found = tuple(Region(copy.box, (*region.window(copy.box), *copy.replicas)) for region, copy in pairs)
    return found


def open_catalog(
    stored: Mapping[str, StoredTensor],
    architecture: Architecture,
    *,
    chunks: Mapping[str, Stored] | None = None,
    with_tied_copies: bool = False,
    drops_mtp: bool = False,
) -> tuple[HuggingFaceCatalog, LeftBehind]:
    """A model from the headers of its files, and what of it is not part of the model.

    Args:
        stored: all tensors of the model by name.
        architecture: by config.json.
        chunks: see `HuggingFaceCatalog`.
        drops_mtp: layers behind those that config.json counts are left out.
        with_tied_copies: a stored head of a tied model counts as another copy of the embedding.

    Raises:
        Problems, or the one problem there is: tensors that are missing, unknown, misshapen or no floats.
    """
    family, sizes = FAMILIES[architecture.family], architecture.sizes()
    tensors, views = dict[str, TensorMeta](), dict[str, tuple[View, ...]]()
    optional, problems = set[str](), list[ConversionError]()
    for row, layer, expert in entries(family, architecture):
        for part in row.parts:
            name = part.name.format(layer=layer, expert=expert)
            try:
                view = hf_view(part, layer, expert, stored, sizes)
            except ConversionError as problem:
                problems.append(problem)
                continue
            if not row.megatron:
                optional.add(name)
            if view.value_dtype not in FLOAT_DTYPES:
                what, found, wanted = "a weight of an unexpected dtype", view.dtype, " or ".join(FLOAT_DTYPES)
                remedy, tensor, file = "save the model dequantised", view.tensor, view.file
                wrong = UnsupportedModel(what, file, tensor=tensor, expected=wanted, found=found, remedy=remedy)
                problems.append(wrong)
            tensors[name], views[name] = TensorMeta(part_shape(part, sizes), view.value_dtype, part.dtype), (view,)
    further = copies_of(family, architecture) if not problems else {}
    if with_tied_copies and architecture.tied and not problems:
        embedding = next(iter(views))  # it comes first in every table
        further[embedding] = (*further.get(embedding, ()), HEAD)
    for name, others in further.items():
        for copy in (View.of(stored[other]) for other in others if other in stored and len(stored[other].shape) == 2):
            view = views[name][0]
            if (copy.value_dtype, copy.rows, copy.columns) == (view.value_dtype, view.rows, view.columns):
                views[name] += (copy,)
    used = {view.tensor for of_tensor in views.values() for view in of_tensor} | {p.tensor for p in problems}
    first, tied = architecture.layers if drops_mtp else None, architecture.tied
    left_behind, unknown = leftovers(stored, used, hf_class=family.hf_class, tied=tied, dropped_from=first)
    raise_together([*problems, *unknown])
    catalog = HuggingFaceCatalog(architecture, tensors, views, frozenset(optional), chunks or {}, bool(chunks))
    for name in tensors if chunks else ():
        catalog.regions(name)  # refuses chunks that do not make up a tensor
    return catalog, left_behind
