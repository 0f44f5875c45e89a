"""Megatron's parameters, and the regions of logical tensors in whatever files hold them. Integers and strings only.

A parameter is a row of a family's table at one layer and expert, and is stored in shards. A shard is stored in pieces:
`torch` keeps it whole or as halves, `torch_dist` has one shard of each parameter and cuts it into boxes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from dist_convert.errors import ConversionError, PlanError, UnknownTensor, WrongShape, raise_together
from dist_convert.formats.megatron.geometry import CutRow, ShardBox
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.megatron.names import describe_homeless, normalise
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import Region, TensorMeta
from dist_convert.models.schema import Architecture, Family, Row, entries, part_shape
from dist_convert.records import FLOAT_DTYPES, Box, View, intersect

#: A shard's stored pieces in one place: the first row and column that each holds, and where it is.
Replica = tuple[tuple[int, int, View], ...]


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter: a table row at one layer and expert, and its canonical name with global numbers."""

    name: str
    cut: CutRow
    layer: int | None
    expert: int | None

    @property
    def row(self) -> Row:
        return self.cut.row

    @property
    def shards(self) -> int:
        return self.cut.shards


def parameters_of(
    architecture: Architecture, grid: Grid, *, imported_experts: bool = False, whole_latents: bool = False
) -> list[Parameter]:
    """All parameters of a model on a grid, in the order of the table; `imported_experts`: see `survey.open_catalog`.

    With `whole_latents` those that Transformer Engine's modules do not cut are whole on every rank.
    """
    sizes, cuts = architecture.sizes(), dict[int, CutRow]()
    found = []
    for entry, layer, expert in entries(FAMILIES[architecture.family], architecture):
        if not entry.megatron:
            continue
        if id(entry) not in cuts:
            row = replace(entry, split="replicated") if whole_latents and entry.is_whole_in_te else entry
            shards = 1 if row.split == "replicated" else grid.tensor if expert is None else grid.expert_tensor
            cuts[id(entry)] = CutRow(row, sizes, shards, expert is None or not imported_experts)
        found.append(Parameter(entry.megatron.format(layer=layer, expert=expert), cuts[id(entry)], layer, expert))
    return found


@dataclass(frozen=True, kw_only=True)
class MegatronCatalog:
    """A `Catalog` of Megatron's parameters, whatever files hold them.

    Attributes:
        architecture, title: the model, and what it and its layout are called for people.
        add_to_norms: 1 where norms are stored as gamma - 1.
        tensors: the logical tensors.
        parameters: for each stored tensor the parameter that it is stacked into, and its number there.
        replicas: for each parameter, by name, and each of its shards where that is stored, once for every equal copy,
            in the same pieces and in the order of their files' ranks.
        params_dtype: in which most bytes are stored.
    """

    architecture: Architecture
    title: str
    add_to_norms: int = 0
    tensors: Mapping[str, TensorMeta] = field(default_factory=dict)
    parameters: Mapping[str, tuple[Parameter, int]] = field(default_factory=dict)
    replicas: Mapping[str, Sequence[Sequence[Replica]]] = field(default_factory=dict)
    params_dtype: str = ""

    @property
    def family(self) -> Family:
        """The model's table."""
        return FAMILIES[self.architecture.family]

    @property
    def is_owned(self) -> bool:
        return True

    def regions(self, name: str) -> tuple[Region, ...]:
        """See `Catalog`; what has no parameter is zeros."""
        if name not in self.parameters:
            return (Region(self.tensors[name].box, ()),)
        parameter, number = self.parameters[name]
        add = self.add_to_norms if parameter.row.is_norm else 0
        return tuple(_regions(parameter.cut.boxes[number], self.replicas[parameter.name], add))

    def padding(self, name: str) -> tuple[Region, ...]:
        if name not in self.parameters:
            return ()
        parameter, _ = self.parameters[name]
        return tuple(_regions(parameter.cut.padding, self.replicas[parameter.name], 0))


def _regions(wanted: Iterable[ShardBox], shards: Sequence[Sequence[Replica]], add: int) -> Iterator[Region]:
    """A region for each stored piece of each box of a tensor."""
    for one in wanted:
        replicas, at = shards[one.shard], one.inside
        if len(replicas[0]) == 1:  # the shard in one piece
            yield Region(one.box, tuple([view.window(at) for ((_, _, view),) in replicas]), add)
            continue
        for number, (row, column, view) in enumerate(replicas[0]):
            inside = intersect(at, Box(row, column, view.rows, view.columns))
            if inside is not None:
                window = Box(inside.row - row, inside.column - column, inside.rows, inside.columns)
                first = one.box.row + inside.row - at.row, one.box.column + inside.column - at.column
                box = Box(*first, inside.rows, inside.columns)
                yield Region(box, tuple(replica[number][2].window(window) for replica in replicas), add)


_Catalog = TypeVar("_Catalog", bound=MegatronCatalog)


def with_tensors(catalog: _Catalog, parameters: Sequence[Parameter]) -> _Catalog:
    """A catalog that has the replicas of all of `parameters_of`, with what follows from them.

    What is not stored has the dtype in which most bytes are.

    Raises:
        Problems, or the one problem there is: two rows name one tensor, or the boxes of a parameter do not cover its
            tensors and shards exactly.
    """
    faults = ((one, fault) for one in parameters for fault in one.cut.faults)
    what = "the plan does not cover a tensor exactly"
    raise_together([PlanError(what, tensor=one.name, found=fault) for one, fault in faults])
    bytes_of = Counter[str]()
    for view in (view for shards in catalog.replicas.values() for copies in shards for _, _, view in copies[0]):
        bytes_of[view.dtype] += view.size_bytes
    params_dtype = bytes_of.most_common(1)[0][0]
    architecture, following = catalog.architecture, iter(parameters)
    sizes = architecture.sizes()
    tensors = {}
    stacked: dict[str, tuple[Parameter, int]] = {}
    known: dict[tuple[int, str], TensorMeta] = {}  # which layers and experts share
    for row, layer, expert in entries(catalog.family, architecture):
        parameter = next(following) if row.megatron else None
        dtype = catalog.replicas[parameter.name][0][0][0][2].dtype if parameter else params_dtype
        for number, part in enumerate(row.parts):
            name = part.name.format(layer=layer, expert=expert)
            if name in tensors:
                raise PlanError("two rows of the table name one tensor", tensor=name)
            if (id(part), dtype) not in known:
                known[id(part), dtype] = TensorMeta(part_shape(part, sizes), dtype, part.dtype)
            tensors[name] = known[id(part), dtype]
            if parameter:
                stacked[name] = (parameter, number)
    return replace(catalog, tensors=tensors, parameters=stacked, params_dtype=params_dtype)


def dtype_problems(view: View, expected: str) -> list[ConversionError]:
    """What is wrong with the dtype of a stored weight, whose parameter has another one elsewhere."""
    if view.dtype == expected and view.dtype in FLOAT_DTYPES:
        return []
    what, tensor, file = "a weight of an unexpected dtype", view.tensor, view.file
    wanted = f"{expected if expected in FLOAT_DTYPES else ' or '.join(FLOAT_DTYPES)} in every shard"
    remedy = "quantised and mixed shards are not converted; save the checkpoint in bf16, fp16 or fp32"
    return [WrongShape(what, file, tensor=tensor, expected=wanted, found=view.dtype, remedy=remedy)]


def unknown_tensor(family: Family, file: str, name: str) -> UnknownTensor:
    """The error about a tensor that has no place in a model."""
    what, expected = f"{name} has no place in a {family.name} model", f"only parameters of {family.hf_class}"
    remedy = "nothing is dropped silently: convert with a family that has this parameter"
    return UnknownTensor(what, file, expected, tensor=name, found=describe_homeless(normalise(name)), remedy=remedy)
