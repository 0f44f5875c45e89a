"""Megatron's parameters, and the regions of logical tensors in whatever files hold them. Integers and strings only.

A parameter is a row of a family's table at one layer and expert, and is stored in shards. A shard is stored in pieces:
`torch` keeps it whole or as halves, `torch_dist` has one shard of each parameter and cuts it into boxes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from dist_convert.errors import ConversionError, PlanError, UnknownTensor, WrongShape
from dist_convert.formats.megatron.geometry import Place, cover_faults, shard_count, shard_size
from dist_convert.formats.megatron.grid import Grid
from dist_convert.formats.megatron.names import describe_homeless, normalise
from dist_convert.models import FAMILIES
from dist_convert.models.catalog import Region, TensorMeta
from dist_convert.models.schema import Architecture, Family, Row, entries, part_shape, parts_of
from dist_convert.records import FLOAT_DTYPES, Box, View, intersect

#: A shard's stored pieces in one place: the first row and column that each holds, and where it is.
Replica = tuple[tuple[int, int, View], ...]


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter: a table row at one layer and expert, in `shards` different shards.

    `is_per_shard`: see `geometry.places`.
    """

    row: Row
    layer: int | None
    expert: int | None
    shards: int
    is_per_shard: bool = True

    @property
    def name(self) -> str:
        """Canonical name with global numbers."""
        return self.row.megatron.format(layer=self.layer, expert=self.expert)

    def shard_size(self, architecture: Architecture) -> tuple[int, int]:
        """Rows and columns of each shard."""
        return shard_size(self.row, architecture.sizes(), self.shards, is_per_shard=self.is_per_shard)


@cache
def _whole(row: Row) -> Row:
    return replace(row, split="replicated")


def parameter_of(
    row: Row,
    layer: int | None,
    expert: int | None,
    grid: Grid,
    *,
    imported_experts: bool = False,
    whole_latents: bool = False,
) -> Parameter:
    """A table row at one layer and expert, on a grid.

    Args:
        row, layer, expert, grid: the row, global numbers, and the grid.
        imported_experts: see `survey.open_catalog`.
        whole_latents: parameters that Transformer Engine's modules do not cut are whole on every rank.
    """
    if whole_latents and row.is_whole_in_te:
        row = _whole(row)
    shards = shard_count(row, grid.tensor if expert is None else grid.expert_tensor)
    return Parameter(row, layer, expert, shards, is_per_shard=expert is None or not imported_experts)


def parameters_of(
    architecture: Architecture, grid: Grid, *, imported_experts: bool = False, whole_latents: bool = False
) -> Iterator[Parameter]:
    """All parameters of a model on a grid; see `parameter_of`."""
    for entry, layer, expert in entries(FAMILIES[architecture.family], architecture):
        if isinstance(entry, Row):
            yield parameter_of(
                entry, layer, expert, grid, imported_experts=imported_experts, whole_latents=whole_latents
            )


def stored_regions(
    wanted: Iterable[Place], replicas_of: Callable[[int], tuple[Replica, ...]], add: int = 0
) -> Iterator[Region]:
    """A region for each stored piece of each place of a tensor.

    Args:
        wanted: the places.
        replicas_of: where a shard is stored, once for every equal copy, in the same pieces.
        add: see `Region`.
    """
    found: dict[int, tuple[Replica, ...]] = {}
    for place in wanted:
        if place.shard not in found:
            found[place.shard] = replicas_of(place.shard)
        for number, (row, column, view) in enumerate(found[place.shard][0]):
            inside = intersect(place.inside, Box(row, column, view.rows, view.columns))
            if inside is not None:
                window = Box(inside.row - row, inside.column - column, inside.rows, inside.columns)
                box = Box(
                    place.box.row + inside.row - place.inside.row,
                    place.box.column + inside.column - place.inside.column,
                    inside.rows,
                    inside.columns,
                )
                yield Region(box, tuple(replica[number][2].window(window) for replica in found[place.shard]), add)


def tensors_of(
    architecture: Architecture,
    grid: Grid,
    dtypes: Mapping[str, str],
    params_dtype: str,
    *,
    imported_experts: bool = False,
    whole_latents: bool = False,
) -> tuple[dict[str, TensorMeta], dict[str, tuple[Parameter, int]]]:
    """Every tensor of the tables; and those that are stored, with the parameter that each is stacked into.

    Args:
        architecture, grid, imported_experts, whole_latents: see `parameters_of`.
        dtypes: of each parameter, by its canonical name.
        params_dtype: of what is not stored.

    Returns:
        By the tensor's name: what it is; the parameter, and the tensor's number in its row's parts.

    Raises:
        PlanError: two rows name one tensor.
    """
    sizes = architecture.sizes()
    tensors: dict[str, TensorMeta] = {}
    stacked: dict[str, tuple[Parameter, int]] = {}
    for entry, layer, expert in entries(FAMILIES[architecture.family], architecture):
        parameter = None
        if isinstance(entry, Row):
            parameter = parameter_of(
                entry, layer, expert, grid, imported_experts=imported_experts, whole_latents=whole_latents
            )
        for number, part in enumerate(parts_of(entry)):
            name = part.name.format(layer=layer, expert=expert)
            if name in tensors:
                raise PlanError("two rows of the table name one tensor", tensor=name)
            dtype = dtypes[parameter.name] if parameter else params_dtype
            tensors[name] = TensorMeta(part_shape(part, sizes), dtype, part.dtype)
            if parameter:
                stacked[name] = (parameter, number)
    return tensors, stacked


def cover_problems(
    architecture: Architecture, grid: Grid, *, imported_experts: bool = False, whole_latents: bool = False
) -> Iterator[PlanError]:
    """Parameters whose places do not cover their tensors and shards exactly.

    Layers and experts repeat the geometry of a row, which depends on nothing else.
    """
    checked: dict[tuple[int, int], list[str]] = {}
    listed = parameters_of(architecture, grid, imported_experts=imported_experts, whole_latents=whole_latents)
    for parameter in listed:
        row, shards = parameter.row, parameter.shards
        key = (id(row), shards)
        if key not in checked:
            sizes = architecture.sizes()
            checked[key] = list(cover_faults(row, sizes, shards, is_per_shard=parameter.is_per_shard))
        for fault in checked[key]:
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
