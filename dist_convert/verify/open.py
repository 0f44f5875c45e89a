"""Opens a checkpoint of either kind for a verification, from the headers of its files.

Files of one name on the disks of several nodes are each a copy of its own, and compared where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dist_convert.errors import ConversionError, InconsistentShards, UnsupportedModel, raise_together
from dist_convert.formats.huggingface.config import architecture_from_config, config_vocab
from dist_convert.formats.huggingface.names import hf_view, leftovers
from dist_convert.formats.megatron.args import architecture_from_args, true_vocab
from dist_convert.hf_to_megatron import discover_tensors
from dist_convert.megatron_to_hf import discover_shards, shared_iteration
from dist_convert.models import FAMILIES
from dist_convert.models.schema import Architecture, Part, Row
from dist_convert.plan.content import added_to_norms, locate_shards, without_expert_interleave
from dist_convert.plan.megatron import (
    MegatronSide,
    Parameter,
    Replica,
    Survey,
    entries,
    megatron_side,
    parameters,
    part_shape,
    part_size,
    replicas,
    survey,
    tied_replicas,
)
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.discover import Discovery, gather_listings
from dist_convert.read.huggingface import CONFIG_FILE, read_directory
from dist_convert.read.megatron import Shard
from dist_convert.read.source import stamp
from dist_convert.records import FLOAT_DTYPES, Box, StoredTensor, View, intersect, name_at
from dist_convert.tokenizer.find import find_tokenizer
from dist_convert.verify.catalog import Checkpoint, Opened, Region, Which, Whole, places


def with_every_copy(checkpoint: Checkpoint, world: World) -> Checkpoint:
    """The checkpoint with a copy for each different file of one name, under `name_at` a number of its own.

    Args:
        checkpoint: as its files' names describe it.
        world: this rank.
    """
    seen = sorted(checkpoint.visible[world.rank])
    listings = gather_listings(world, {file: stamp(checkpoint.path / file) for file in seen})
    copies: dict[str, list[tuple[int, ...]]] = {}
    for listing in listings:
        for file, found in listing.items():
            known = copies.setdefault(file, [])
            if tuple(found) not in known:
                known.append(tuple(found))
    if all(len(known) == 1 for known in copies.values()):
        return checkpoint

    def every(view: View) -> list[View]:
        return [replace(view, file=name_at(number, view.file)) for number in range(len(copies[view.file]))]

    def regions(name: str) -> tuple[Region, ...]:
        return tuple(
            Region(region.box, tuple(copy for view in region.copies for copy in every(view)))
            for region in checkpoint.regions(name)
        )

    visible = tuple(
        frozenset(name_at(copies[file].index(tuple(found)), file) for file, found in listing.items())
        for listing in listings
    )
    return replace(checkpoint, regions=regions, visible=visible, is_at_places=True)


def open_huggingface(directory: Path, world: World) -> Opened:
    """Read the config and the headers of all weights files.

    Raises:
        SourceError: all that they show to be wrong.
    """
    seen = read_directory(directory)
    vocab = config_vocab(seen.config, file=CONFIG_FILE)
    # Output biases without MLP biases are read as tensors that must be zero, which the comparison finds out.
    architecture = architecture_from_config(
        seen.config, padded_vocab=vocab, file=CONFIG_FILE, zero_output_bias=not seen.config.get("mlp_bias")
    )
    found, stored = discover_tensors(directory, seen, world)
    return Opened(vocab, lambda _: _huggingface_catalog(directory, architecture, found, stored))


def _huggingface_catalog(
    directory: Path, architecture: Architecture, found: Discovery, stored: Mapping[str, StoredTensor]
) -> Checkpoint:
    tensors: dict[str, Whole] = {}
    copies: dict[str, tuple[View, ...]] = {}
    problems: list[ConversionError] = []
    sizes = architecture.sizes()
    for part, layer, expert in _parts(architecture):
        name = part.name.format(layer=layer, expert=expert)
        try:
            view = hf_view(part.name, layer, expert, stored, *part_size(part, sizes), experts=architecture.experts)
        except ConversionError as problem:
            problems.append(problem)
            continue
        if view.dtype not in FLOAT_DTYPES:
            problems.append(_no_float(view))
        tensors[name] = Whole(name, part_shape(part, sizes), view.dtype)
        copies[name] = (view,)
    copies |= _tied_head(architecture, stored, copies)
    _, unknown = leftovers(
        stored,
        {view.tensor for views in copies.values() for view in views} | {problem.tensor for problem in problems},
        hf_class=FAMILIES[architecture.family].hf_class,
        tied=architecture.tied,
    )
    raise_together([*problems, *unknown])
    return Checkpoint(
        path=directory,
        kind="Hugging Face",
        architecture=architecture,
        says_vocab=True,
        tensors=tensors,
        regions=lambda name: (Region(Box(0, 0, tensors[name].rows, tensors[name].columns), copies[name]),),
        padding_rows=0,
        visible=found.visible,
    )


def _parts(architecture: Architecture) -> list[tuple[Part, int | None, int | None]]:
    return [
        (part, layer, expert)
        for entry, layer, expert in entries(FAMILIES[architecture.family], architecture)
        for part in (entry.parts if isinstance(entry, Row) else (entry.part,))
    ]


def _tied_head(
    architecture: Architecture, stored: Mapping[str, StoredTensor], copies: Mapping[str, tuple[View, ...]]
) -> dict[str, tuple[View, ...]]:
    """The embedding with the head as another copy of it, where a tied model is saved with one of the same shape."""
    family = FAMILIES[architecture.family]
    heads = [entry for entry in family.after if isinstance(entry, Row) and entry.unless == "tied"]
    if not architecture.tied or not isinstance(family.before[0], Row):
        return {}
    embedding = family.before[0].parts[0].name
    views = copies.get(embedding, ())
    for head in heads:
        tensor = stored.get(head.parts[0].name)
        if views and tensor and tensor.dtype == views[0].dtype and tensor.shape == (views[0].rows, views[0].columns):
            views = (*views, View.of(tensor))
    return {embedding: views} if views else {}


def _no_float(view: View) -> UnsupportedModel:
    return UnsupportedModel(
        "a weight of an unexpected dtype",
        tensor=view.tensor,
        file=view.file,
        expected=" or ".join(FLOAT_DTYPES),
        found=view.dtype,
        remedy="save the model dequantised",
    )


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
        lambda elsewhere: _megatron_catalog(
            which, directory, found, shards, says, min(says or elsewhere or padded, padded)
        ),
    )


def _megatron_catalog(
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
