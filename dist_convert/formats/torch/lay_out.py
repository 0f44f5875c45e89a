"""What becomes Megatron's `torch`: what is read, what is written, and what is said about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dist_convert.formats.format import Model
from dist_convert.formats.huggingface.open import HuggingFaceModel, check_tied, with_zero_biases
from dist_convert.formats.megatron.grid import Grid, check_rank_order, files_of_places
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.open import TorchModel
from dist_convert.formats.torch.survey import files_of_headers, open_catalog
from dist_convert.formats.torch.target import (
    Given,
    Own,
    header_of,
    lay_out_target,
    notes_to_megatron,
    own_of,
    settle_target,
)
from dist_convert.formats.torch.target_args import read_margs, target_tokenizer
from dist_convert.formats.torch.target_shards import target_dtypes
from dist_convert.options import HUGGINGFACE, RELEASE, TARGET_DTYPES, TORCH, Options, path_flags
from dist_convert.plan.content import plan_content
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.records import local_name, name_at
from dist_convert.write.places import find_places, refuse_several_places
from dist_convert.write.task import Task


def to_torch(job: Options, model: Model, world: World) -> Task:
    """Work out the Megatron checkpoint that a model becomes.

    Raises:
        SourceError, UsageError: all that the headers and flags show to be wrong.
    """
    if isinstance(model, HuggingFaceModel):
        model = with_zero_biases(model, world)
    source, left_behind = model.catalog()
    own = own_of(model, source) if isinstance(model, TorchModel) and isinstance(source, TorchCatalog) else None
    given = _given(job, model, own, world)
    architecture, settings = settle_target(job, source.architecture, model.vocab, given.margs, own)
    wanted = TARGET_DTYPES[job.target_params_dtype or "keep"]
    params_dtype = wanted if own or wanted else source.params_dtype
    dtypes = target_dtypes(source, wanted)
    target = lay_out_target(job, model.directory, given, architecture, settings, params_dtype, dtypes)
    directory = job.target / (RELEASE if settings.iteration is None else f"iter_{settings.iteration:07d}")
    places = _places(job, world, directory)
    of_places = _files_of_places(job, settings.grid, given, frozenset(target.files), places, world.nodes)
    planned = sorted(frozenset[str]().union(*of_places))
    headers = {file: header_of(target, file) for file in planned}
    shards, _ = open_catalog(headers, architecture, with_tied_copies=True)
    content = plan_content(
        source,
        shards,
        files_of_headers(headers),
        target_dtype=wanted,
        left_behind=left_behind,
        repeat_last_row=job.vocab_padding == "last-row",
        extras=frozenset((file, name) for file in planned for of, name in target.extras if of == local_name(file)),
    )
    if isinstance(model, HuggingFaceModel):
        check_tied(model, source, world)
    writable = tuple(of_places[place] for place in places)
    settled = replace(
        job,
        target_params_dtype=job.target_params_dtype or "keep",
        iteration=RELEASE if settings.iteration is None else settings.iteration,
        make_vocab_size_divisible_by=settings.divisible_by,
        saver_transformer_impl=settings.dialect.norms,
        expert_layout=settings.dialect.experts,
    )
    return Task(
        job=settled,
        content=content,
        source_format=TORCH if own else HUGGINGFACE,
        source=model.directory,
        source_identity=model.found.identity,
        source_listing=model.found.listing,
        visible=model.found.visible,
        target=directory,
        places=places,
        writable=writable,
        notes=notes_to_megatron(job, target, settings, given, content, places, writable),
        layout=target,
    )


def _given(job: Options, model: Model, own: Own | None, world: World) -> Given:
    """Rank 0's answer for all: paths may lead elsewhere on other nodes, and all ranks must write the same args.

    Raises:
        UsageError, CorruptFile: see `read_margs`.
    """
    mine: list[Any] = []
    if world.rank == 0:
        said = read_margs(job.source_margs_file) if job.source_margs_file else None
        mine = [said, job.tokenizer_model, job.tokenizer_type]
        if own is None or job.tokenizer_model is not None:
            args = own.args if own else said
            mine[1:] = target_tokenizer(job.tokenizer_model, job.tokenizer_type, job.source, model.directory, args)
    margs, tokenizer_model, tokenizer_type = gather_objects(world, mine)[0]
    return Given(margs, tokenizer_model, tokenizer_type, model.vocab, own)


def _places(job: Options, world: World, target: Any) -> tuple[int, ...]:
    """For each rank, the number of the place where its target lies.

    Raises:
        TargetError: nodes see different targets, and no flag says that this is meant.
    """
    flag = path_flags(job)[1]
    places = find_places(world, target, flag)
    if job.target_ranks_per_node is None:
        refuse_several_places(
            places, target, flag, ", or give --target-ranks-per-node if each node is to keep its own shards"
        )
    return places


def _files_of_places(
    job: Options, grid: Grid, given: Given, files: frozenset[str], places: Sequence[int], nodes: Sequence[int]
) -> tuple[frozenset[str], ...]:
    """For each place the rank files that are made there, under names that tell places apart."""
    if not max(places) or not job.target_ranks_per_node:
        return (files,)
    check_rank_order(given.own.args if given.own else given.margs)
    held = files_of_places(grid, places, nodes, job.target_ranks_per_node)
    return tuple(frozenset(name_at(place, file) for file in at) for place, at in enumerate(held))
