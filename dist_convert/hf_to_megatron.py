"""Hugging Face to Megatron: what is read, what is written, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_convert.errors import CheckpointNotFound
from dist_convert.formats.huggingface.catalog import HuggingFaceCatalog
from dist_convert.formats.huggingface.names import HEAD
from dist_convert.formats.huggingface.open import HuggingFaceModel, open_huggingface
from dist_convert.formats.megatron.grid import check_rank_order, files_of_places
from dist_convert.formats.torch.survey import files_of_headers, open_catalog
from dist_convert.formats.torch.target import (
    Given,
    TorchTarget,
    header_of,
    lay_out_target,
    model_and_grid,
    notes_to_megatron,
)
from dist_convert.formats.torch.target_args import read_margs, target_tokenizer
from dist_convert.formats.torch.target_shards import target_dtypes
from dist_convert.models.llama import OUTPUT_BIAS_OF_ZEROS
from dist_convert.models.schema import MOST_LAYERS, is_size
from dist_convert.options import TARGET_DTYPES, Options
from dist_convert.plan.content import Content, plan_content
from dist_convert.ranks.channel import Channel
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.hub import fetched_directory, local_directory, revision_on_hub
from dist_convert.read.values import all_are_zero, check_tied_head
from dist_convert.records import local_name, name_at
from dist_convert.task import Task
from dist_convert.write.partial import refuse_unfinished
from dist_convert.write.places import find_places, refuse_several_places


def hf_to_megatron(job: Options, world: World, channel: Channel) -> Task:
    """Read the model's headers and work out the Megatron checkpoint that it becomes.

    Raises:
        SourceError, UsageError: all that the headers and flags show to be wrong.
    """
    model = open_huggingface(_fetch(job, world, channel), world)
    iteration = job.iteration
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    places = _places(job, world, job.target / name)
    given = _given(job, world, model.directory)
    biases = _output_biases(model.config)
    zeros = biases if all_are_zero(world, model.directory, model.found.visible, model.stored, biases) else set()
    source, target, content, writable = _plan(job, model, zeros, given, places, world.nodes)
    if source.architecture.tied and HEAD in model.stored:
        [embedding] = next(iter(source.views.values()))  # it comes first in every table
        check_tied_head(world, model.directory, model.found.visible, embedding, model.stored[HEAD])

    return Task(
        content=content,
        direction="hf-to-megatron",
        source=model.directory,
        source_identity=model.found.identity,
        source_listing=model.found.listing,
        visible=model.found.visible,
        target=job.target / name,
        places=places,
        writable=writable,
        target_flag="--save-dir",
        notes=notes_to_megatron(job, target, given.margs, content, places, writable),
        layout=target,
    )


def _fetch(job: Options, world: World, channel: Channel) -> Path:
    """The model's directory. Rank 0 asks a hub, one rank of each machine fetches the same revision, all find it."""
    refuse_unfinished(Path(job.source))
    is_here: list[bool] = gather_objects(world, Path(job.source).is_dir())
    if all(is_here):
        return Path(job.source)
    if any(is_here):
        raise CheckpointNotFound(
            "the Hugging Face directory is not on every node",
            file=job.source,
            expected="a directory on every rank, with config.json and those of the weights files that are there",
            found=f"nothing on rank {is_here.index(False)}",
            remedy="copy it there, or give a hub id; check --load-dir on every node",
        )
    name: str = gather_objects(world, revision_on_hub(job.source) if world.rank == 0 else "")[0]
    channel.run_on(world.first_ranks, "fetching the model", lambda: local_directory(name), job.timeout_seconds)
    return fetched_directory(name)


def _given(job: Options, world: World, directory: Path) -> Given:
    """Rank 0's answer for all: paths may lead elsewhere on other nodes, and all ranks must write the same args.

    Raises:
        UsageError, CorruptFile: see `read_margs`.
    """
    mine: list[Any] = []
    if world.rank == 0:
        margs = read_margs(job.source_margs_file) if job.source_margs_file else None
        mine = [margs, *target_tokenizer(job.tokenizer_model, job.tokenizer_type, job.source, directory, margs)]
    return Given(*gather_objects(world, mine)[0])


def _places(job: Options, world: World, target: Path) -> tuple[int, ...]:
    """For each rank, the number of the place where its target lies.

    Raises:
        TargetError: nodes see different targets, and no flag says that this is meant.
    """
    places = find_places(world, target, "--save-dir")
    if job.target_ranks_per_node is None:
        refuse_several_places(
            places, target, "--save-dir", ", or give --target-ranks-per-node if each node is to keep its own shards"
        )
    return places


def _plan(
    job: Options,
    model: HuggingFaceModel,
    zeros: set[str],
    given: Given,
    places: Sequence[int],
    nodes: Sequence[int],
) -> tuple[HuggingFaceCatalog, TorchTarget, Content, tuple[frozenset[str], ...]]:
    """The source, the target, all that is copied, and for each rank the target files that it can write."""
    architecture, grid, stages = model_and_grid(job, model.config, given.margs, zero_output_bias=bool(zeros))
    source, left_behind = model.catalog(zero_output_bias=bool(zeros))
    if zeros:
        size_bytes = sum(model.stored[name].size_bytes for name in zeros)
        left_behind = (*left_behind, ("output bias of attention (all zeros)", len(zeros), size_bytes))
    wanted = TARGET_DTYPES[job.target_params_dtype]
    params_dtype, dtypes = target_dtypes(source, wanted)
    target = lay_out_target(job, model.directory, given, architecture, grid, stages, wanted or params_dtype, dtypes)
    of_places: tuple[frozenset[str], ...] = (frozenset(target.files),)
    if max(places) and job.target_ranks_per_node:
        check_rank_order(given.margs)
        held = files_of_places(grid, places, nodes, job.target_ranks_per_node)
        of_places = tuple(frozenset(name_at(place, file) for file in files) for place, files in enumerate(held))
    planned = sorted(frozenset[str]().union(*of_places))
    headers = {file: header_of(target, job, file) for file in planned}
    shards, _ = open_catalog(headers, architecture, with_tied_copies=True)
    content = plan_content(
        source,
        shards,
        files_of_headers(headers),
        title=shards.title,
        params_dtype=params_dtype,
        target_dtype=wanted,
        kept_dtypes={
            name: meta.dtype
            for name, meta in source.tensors.items()
            if name in shards.parameters and meta.dtype != params_dtype
        },
        left_behind=left_behind,
        repeat_last_row=job.vocab_padding == "last-row",
        extras=frozenset((file, name) for file in planned for of, name in target.extras if of == local_name(file)),
    )
    return source, target, content, tuple(of_places[place] for place in places)


def _output_biases(config: Mapping[str, Any]) -> set[str]:
    """The names of the output projections' biases of a model that has no other output biases."""
    layers = config.get("num_hidden_layers")
    has_biases = config.get("attention_bias") and not config.get("mlp_bias")
    if not has_biases or not isinstance(layers, int) or not is_size(layers, MOST_LAYERS):
        return set()
    return {OUTPUT_BIAS_OF_ZEROS.part.name.format(layer=layer) for layer in range(layers)}
