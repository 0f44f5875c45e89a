"""Megatron's parameters, and the regions of logical tensors in whatever files hold them. Integers and strings only.

A parameter is a row of a family's table at one layer and expert, and is stored in shards. A shard is stored in pieces:
`torch` keeps it whole or as halves, `torch_dist` has one shard of each parameter and cuts it into boxes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from dist_convert.errors import ConversionError, PlanError, UnknownTensor, WrongShape
from dist_convert.formats.megatron.geometry import (
    ShardBox,
    cover_faults,
    padding_boxes,
    shard_boxes,
    shard_count,
    shard_size,
)
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.megatron.names import Spelling, describe_homeless, normalise, spellings
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import Region, TensorMeta
from dist_convert.models.schema import Architecture, Family, Row, entries, part_shape, parts_of
from dist_convert.records import FLOAT_DTYPES, Box, View, intersect

#: A shard's stored pieces in one place: the first row and column that each holds, and where it is.
Replica = tuple[tuple[int, int, View], ...]


@dataclass(frozen=True)
class CutRow:
    """A table row on a grid, in `shards` different shards: what its parameters of all layers and experts share.

    `sizes` are those of the `Architecture`; `is_per_shard`: see `geometry.shard_boxes`.
    """

    row: Row
    sizes: Mapping[str, int]
    shards: int
    is_per_shard: bool = True

    @cached_property
    def shard_size(self) -> tuple[int, int]:
        """Rows and columns of each shard."""
        return shard_size(self.row, self.sizes, self.shards, is_per_shard=self.is_per_shard)

    @cached_property
    def boxes(self) -> tuple[tuple[ShardBox, ...], ...]:
        """For each of its tensors, see `geometry.shard_boxes`."""
        numbers = range(len(self.row.parts))
        is_per_shard = self.is_per_shard
        return tuple(
            tuple(shard_boxes(self.row, number, self.sizes, self.shards, is_per_shard=is_per_shard))
            for number in numbers
        )

    @cached_property
    def padding(self) -> tuple[ShardBox, ...]:
        """See `geometry.padding_boxes`."""
        return tuple(padding_boxes(self.row, self.sizes, self.shards))

    @cached_property
    def spellings(self) -> tuple[Spelling, ...]:
        """See `names.spellings`."""
        return spellings(self.row)


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
    """All parameters of a model on a grid, in the order of the table.

    Args:
        architecture, grid: the model and the grid.
        imported_experts: see `survey.open_catalog`.
        whole_latents: parameters that Transformer Engine's modules do not cut are whole on every rank.
    """
    sizes, cuts = architecture.sizes(), dict[int, CutRow]()
    found = []
    for entry, layer, expert in entries(FAMILIES[architecture.family], architecture):
        if isinstance(entry, Row):
            if id(entry) not in cuts:
                row = replace(entry, split="replicated") if whole_latents and entry.is_whole_in_te else entry
                shards = shard_count(row, grid.tensor if expert is None else grid.expert_tensor)
                cuts[id(entry)] = CutRow(row, sizes, shards, expert is None or not imported_experts)
            name = entry.megatron.format(layer=layer, expert=expert)
            found.append(Parameter(name, cuts[id(entry)], layer, expert))
    return found


class Holder(Protocol):
    """A catalog of Megatron's parameters.

    `parameters` has for each stored tensor the parameter that it is stacked into, and its number there; `replicas` for
    each parameter, by name, and each of its shards where that is stored, once for every equal copy, in the same pieces.
    """

    @property
    def tensors(self) -> Mapping[str, TensorMeta]: ...
    @property
    def parameters(self) -> Mapping[str, tuple[Parameter, int]]: ...
    @property
    def replicas(self) -> Mapping[str, Sequence[Sequence[Replica]]]: ...
    @property
    def add_to_norms(self) -> int: ...


def held_regions(catalog: Holder, name: str) -> tuple[Region, ...]:
    """See `Catalog.regions`; what has no parameter is zeros."""
    if name not in catalog.parameters:
        return (Region(catalog.tensors[name].box, ()),)
    parameter, number = catalog.parameters[name]
    add = catalog.add_to_norms if parameter.row.is_norm else 0
    return tuple(_regions(parameter.cut.boxes[number], catalog.replicas[parameter.name], add))


def held_padding(catalog: Holder, name: str) -> tuple[Region, ...]:
    """See `Catalog.padding`."""
    if name not in catalog.parameters:
        return ()
    parameter, _ = catalog.parameters[name]
    return tuple(_regions(parameter.cut.padding, catalog.replicas[parameter.name], 0))


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


def tensors_of(
    architecture: Architecture, parameters: Iterable[Parameter], dtypes: Mapping[str, str], params_dtype: str
) -> tuple[dict[str, TensorMeta], dict[str, tuple[Parameter, int]]]:
    """Every tensor of the tables; and those that are stored, with the parameter that each is stacked into.

    Args:
        architecture, parameters: the model, and all of `parameters_of`.
        dtypes: of each parameter, by its canonical name.
        params_dtype: of what is not stored.

    Returns:
        By the tensor's name: what it is; the parameter, and the tensor's number in its row's parts.

    Raises:
        PlanError: two rows name one tensor.
    """
    sizes, following = architecture.sizes(), iter(parameters)
    tensors: dict[str, TensorMeta] = {}
    stacked: dict[str, tuple[Parameter, int]] = {}
    known: dict[tuple[int, str], TensorMeta] = {}  # which layers and experts share
    for entry, layer, expert in entries(FAMILIES[architecture.family], architecture):
        parameter = next(following) if isinstance(entry, Row) else None
        dtype = dtypes[parameter.name] if parameter else params_dtype
        for number, part in enumerate(parts_of(entry)):
            name = part.name.format(layer=layer, expert=expert)
            if name in tensors:
                raise PlanError("two rows of the table name one tensor", tensor=name)
            if (id(part), dtype) not in known:
                known[id(part), dtype] = TensorMeta(part_shape(part, sizes), dtype, part.dtype)
            tensors[name] = known[id(part), dtype]
            if parameter:
                stacked[name] = (parameter, number)
    return tensors, stacked


def cover_problems(parameters: Iterable[Parameter]) -> Iterator[PlanError]:
    """Parameters whose boxes do not cover their tensors and shards exactly."""
    checked: dict[int, list[str]] = {}
    for parameter in parameters:
        cut = parameter.cut
        if id(cut) not in checked:
            checked[id(cut)] = list(cover_faults(cut.row, cut.sizes, cut.shards, is_per_shard=cut.is_per_shard))
        for fault in checked[id(cut)]:
            yield PlanError("the plan does not cover a tensor exactly", tensor=parameter.name, found=fault)


def dtype_problems(view: View, expected: str) -> list[ConversionError]:
    """What is wrong with the dtype of a stored weight, whose parameter has another one elsewhere."""
    if view.dtype == expected and view.dtype in FLOAT_DTYPES:
        return []
    return [
        WrongShape(
            "a weight of an unexpected dtype",
            tensor=view.tensor,
            file=view.file,
            expected=f"{expected if expected in FLOAT_DTYPES else ' or '.join(FLOAT_DTYPES)} in every shard",
            found=view.dtype,
            remedy="quantised and mixed shards are not converted; save the checkpoint in bf16, fp16 or fp32",
        )
    ]


def unknown_tensor(family: Family, file: str, name: str) -> UnknownTensor:
    """The error about a tensor that has no place in a model."""
    return UnknownTensor(
        f"{name} has no place in a {family.name} model",
        tensor=name,
        file=file,
        expected=f"only parameters of {family.hf_class}",
        found=describe_homeless(normalise(name)),
        remedy="nothing is dropped silently: convert with a family that has this parameter",
    )
