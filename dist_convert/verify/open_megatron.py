"""A Megatron checkpoint as a verification sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_convert.boxes import Box, intersect
from dist_convert.errors import InconsistentShards
from dist_convert.megatron_to_hf import discover_shards, shared_iteration
from dist_convert.metadata.megatron_args import architecture_from_args, true_vocab
from dist_convert.models import FAMILIES
from dist_convert.models.schema import Row
from dist_convert.move.exchange import World, gather_objects
from dist_convert.plan.geometry import part_shape
from dist_convert.plan.megatron import (
    MegatronSide,
    Parameter,
    Replica,
    entries,
    megatron_side,
    parameters,
    replicas,
    tied_replicas,
)
from dist_convert.plan.survey import Survey, survey
from dist_convert.plan.to_huggingface import added_to_norms, locate_shards, without_expert_interleave
from dist_convert.read.discover import Discovery
from dist_convert.read.megatron_shard import Shard
from dist_convert.records import View
from dist_convert.tokenizer.find import find_tokenizer
from dist_convert.verify.catalog import Checkpoint, Opened, Region, Which, Whole
from dist_convert.verify.places import places


@dataclass(frozen=True)
class _Zeros:
    """A tensor that Megatron has no parameter for, and that is all zeros."""


#: Where a tensor comes from: a parameter and the number of the part.
_Origin = tuple[Parameter, int] | _Zeros


def open_megatron(which: Which, world: World) -> Opened:
    """Read the headers of all shards.

    Raises:
        SourceError: all that the headers show to be wrong.
    """
    directory = shared_iteration(which.path, which.ckpt_dir_name, world, which.name_flag)
    found, shards = discover_shards(directory, world)
    file = min(shards)
    args = shards[file].args
    # The tokenizer's path may exist on rank 0 only.
    size = find_tokenizer(which.tokenizer, args, directory).size if world.rank == 0 else None
    tokenizer = gather_objects(world, size)[0]
    padded = architecture_from_args(args, vocab=None, file=file).padded_vocab
    vocab, who = true_vocab(flag=which.true_vocab_size, args=args, tokenizer=tokenizer, padded=padded, file=file)
    says = None if who == "padded size" else vocab
    return Opened(
        says,
        lambda elsewhere: _catalog(which, directory, found, shards, says, min(says or elsewhere or padded, padded)),
    )


def _catalog(
    which: Which,
    directory: Path,
    found: Discovery,
    shards: dict[str, Shard],
    says: int | None,
    vocab: int,
) -> Checkpoint:
    file = min(shards)
    architecture = architecture_from_args(shards[file].args, vocab=vocab, file=file)
    grid, files = locate_shards(shards, imported_experts=which.habana_imported_experts)
    family = FAMILIES[architecture.family]
    if which.habana_imported_experts:
        family = without_expert_interleave(family)
    side = megatron_side(shards, architecture, family, grid, files)
    origins, tensors = _tensors(side, survey(side, shards), added_to_norms(shards))
    iteration = shards[file].iteration
    return Checkpoint(
        path=directory,
        kind=f"Megatron {grid}" + ("" if iteration is None else f", iteration {iteration}"),
        architecture=architecture,
        says_vocab=says is not None,
        tensors=tensors,
        regions=lambda name: tuple(_regions(side, tensors[name], origins[name])),
        padding_rows=sum(
            architecture.padded_vocab - vocab for parameter in parameters(side) if parameter.row.padded_rows is not None
        ),
        visible=found.visible,
    )


def _tensors(side: MegatronSide, found: Survey, add_to_norms: int) -> tuple[dict[str, _Origin], dict[str, Whole]]:
    sizes = side.architecture.sizes()
    origins: dict[str, _Origin] = {}
    tensors = {}
    listed = iter(parameters(side))
    for entry, layer, expert in entries(side.family, side.architecture):
        parameter = next(listed) if isinstance(entry, Row) else None
        for number, part in enumerate(entry.parts if isinstance(entry, Row) else (entry.part,)):
            name = part.name.format(layer=layer, expert=expert)
            origins[name] = (parameter, number) if parameter else _Zeros()
            dtype = found.dtypes[parameter.name] if parameter else found.params_dtype
            add = add_to_norms if parameter and parameter.row.is_norm else 0
            tensors[name] = Whole(name, part_shape(part, sizes), dtype, add)
    return origins, tensors


def _regions(side: MegatronSide, tensor: Whole, origin: _Origin) -> Iterator[Region]:
    if isinstance(origin, _Zeros):
        yield Region(Box(0, 0, tensor.rows, tensor.columns), ())
        return
    parameter, number = origin
    stored = [
        replicas(side, parameter, shard) + tied_replicas(side, parameter, shard) for shard in range(parameter.shards)
    ]
    for place in places(parameter.row, number, side.architecture.sizes(), parameter.shards):
        for inside, copies in _pieces(parameter, place.inside, stored[place.shard]):
            row = place.box.row + inside.row - place.inside.row
            column = place.box.column + inside.column - place.inside.column
            yield Region(Box(row, column, inside.rows, inside.columns), copies)


def _pieces(parameter: Parameter, wanted: Box, stored: tuple[Replica, ...]) -> Iterator[tuple[Box, tuple[View, ...]]]:
    """The parts of a shard's box that lie in one stored tensor each, with the views of all equal copies."""
    bounds = [tuple((row, view.rows) for row, view in replica) for replica in stored]
    if len(set(bounds)) > 1:
        raise InconsistentShards(
            "equal copies are stored in different layouts",
            tensor=parameter.name,
            file=", ".join(replica[0][1].file for replica in stored),
        )
    for number, (row, view) in enumerate(stored[0]):
        inside = intersect(wanted, Box(row, 0, view.rows, view.columns))
        if inside is not None:
            window = Box(inside.row - row, inside.column, inside.rows, inside.columns)
            yield inside, tuple(replica[number][1].window(window) for replica in stored)
