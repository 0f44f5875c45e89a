"""What becomes a Megatron checkpoint, of either format: what is read, what is written, and what is said about it."""

from dataclasses import replace
from typing import Any

from dist_convert.formats.format import Model
from dist_convert.formats.huggingface.open import HuggingFaceModel, carried_configs, check_tied, with_zero_biases
from dist_convert.formats.megatron import target as targets
from dist_convert.formats.megatron import target_args as arguments
from dist_convert.formats.megatron.args import dialect_of_args
from dist_convert.formats.megatron.grid import files_of_disks, grid_of_args
from dist_convert.formats.megatron.names import dialect_of, mtp_name_of
from dist_convert.formats.meta.open import MetaModel
from dist_convert.formats.tokenizer.find import find_tokenizer
from dist_convert.formats.tokenizer.record import vocabulary_warnings
from dist_convert.formats.torch.catalog import TorchCatalog
from dist_convert.formats.torch.open import TorchModel
from dist_convert.formats.torch.target import catalog_of_target as torch_catalog
from dist_convert.formats.torch.target import lay_out_torch
from dist_convert.formats.torch_dist.open import DistModel
from dist_convert.formats.torch_dist.target import catalog_of_target as torch_dist_catalog
from dist_convert.formats.torch_dist.target import lay_out_torch_dist
from dist_convert.models.catalog import Catalog
from dist_convert.options import RELEASE, TARGET_DTYPES, TORCH_DIST, Options
from dist_convert.plan.content import plan_content
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.records import local_name, name_at
from dist_convert.write.target_disks import find_disks
from dist_convert.write.task import Target, Task


def to_megatron(job: Options, model: Model, world: World) -> Task:
    """Work out the Megatron checkpoint that a model becomes.

    Raises:
        SourceError, UsageError: all that the headers and flags show to be wrong.
        TargetError: see `find_disks`.
    """
    if isinstance(model, HuggingFaceModel):
        model = with_zero_biases(model, world)
    source, left_behind = model.catalog()
    own = _own(job, model, source)
    given = _given(job, model, own, world)
    architecture, settings = targets.settle_target(job, source.architecture, given)
    wanted = TARGET_DTYPES[job.target_params_dtype or "keep"]
    params_dtype = wanted if own or wanted else source.params_dtype
    dtypes = targets.target_dtypes(source, wanted)
    args = arguments.target_args(job, given, architecture, settings, params_dtype)
    target = targets.MegatronTarget(job.target, architecture, settings, args, dtypes, given.carried)
    disks = find_disks(
        world,
        target.directory,
        is_per_node=job.target_ranks_per_node is not None,
        otherwise="--target-ranks-per-node if each node is to keep its own shards",
    )
    layout: Target
    catalog: Catalog
    of_disks: tuple[frozenset[str], ...]
    if job.to == TORCH_DIST:
        layout = lay_out_torch_dist(target)
        catalog, files = torch_dist_catalog(layout)
        of_disks, extras = (frozenset(file.name for file in files),), frozenset[tuple[str, str]]()
    else:
        layout = lay_out_torch(job, model.directory, target)
        of_disks = (frozenset(layout.files),)
        if max(disks) and job.target_ranks_per_node:  # under names that tell disks apart
            training_args = own.args if own else given.training_args
            held = files_of_disks(settings.grid, disks, world.nodes, job.target_ranks_per_node, training_args)
            of_disks = tuple(frozenset(name_at(disk, file) for file in at) for disk, at in enumerate(held))
        planned = sorted(frozenset[str]().union(*of_disks))
        catalog, files = torch_catalog(layout, planned)
        extras = frozenset((file, name) for file in planned for of, name in layout.extras if of == local_name(file))
    content = plan_content(
        source,
        catalog,
        files,
        target_dtype=wanted,
        left_behind=left_behind,
        repeat_last_row=job.vocab_padding == "last-row",
        extras=extras,
    )
    if isinstance(model, HuggingFaceModel):
        check_tied(model, source, world)
    writable = tuple(of_disks[disk] for disk in disks)
    settled = replace(
        job,
        target_params_dtype=job.target_params_dtype or "keep",
        iteration=RELEASE if settings.iteration is None else settings.iteration,
        make_vocab_size_divisible_by=settings.divisible_by,
        saver_transformer_impl=settings.dialect.norms,
        expert_layout=settings.dialect.experts,
        mtp_layer_name=settings.dialect.mtp,
    )
    return Task(
        job=settled,
        content=content,
        source=model,
        target=target.directory,
        rank=world.rank,
        disks=disks,
        writable=writable,
        notes=[
            *model.notes,
            *vocabulary_warnings({"tokenizer": given.tokens}, architecture.vocab, architecture.vocab),
            *targets.notes_to_megatron(job, target, given, content, disks, writable),
        ],
        layout=layout,
    )


def _own(job: Options, model: Model, catalog: Catalog) -> arguments.MegatronSource | None:
    """What a Megatron source says of itself."""
    if isinstance(model, TorchModel) and isinstance(catalog, TorchCatalog):
        grid, chunks = catalog.grid, catalog.chunks
        listed = [name for shard in model.shards.values() for chunk in shard.chunks for name in chunk]
        norms, experts = dialect_of(listed)
    elif isinstance(model, DistModel):
        # How its pipeline was cut does not matter where the target's is said.
        cut = (*arguments.PIPELINE_LAYOUT, "pipeline_model_parallel_size") if targets.cuts_pipeline(job) else ()
        args = {name: value for name, value in model.args.items() if name not in cut}
        grid, chunks = grid_of_args(args, catalog.architecture.layers)
        norms, experts = dialect_of_args(model.args)
        listed = [tensor.key for tensor in model.stored.values()]
    else:
        return None
    if job.to == TORCH_DIST:
        norms = dialect_of_args(model.args)[0]  # names do not tell there, and training goes by the args
    is_release = model.directory.resolve().name == RELEASE
    dialect = arguments.TargetDialect(norms, experts or "sequential", mtp_name_of(listed))
    return arguments.MegatronSource(model.args, grid, chunks, None if is_release else model.iteration or 0, dialect)


def _given(job: Options, model: Model, own: arguments.MegatronSource | None, world: World) -> arguments.TargetInputs:
    """Rank 0's answer for all: paths may lead elsewhere on other nodes, and all ranks must write the same args."""
    mine: list[Any] = []
    if world.rank == 0:
        said = arguments.read_training_args(job.source_margs_file) if job.source_margs_file else None
        asked, found = job.tokenizer_model, model.tokenizer
        if asked is None and isinstance(model, MetaModel) and found.path and found.kind != "tiktoken":
            asked = str(found.path)  # Megatron reads no bare file of Llama 3's
        mine = [said, asked, job.tokenizer_type, carried_configs(model)]
        if asked is not None or isinstance(model, HuggingFaceModel):
            args = own.args if own else said
            mine[1:3] = arguments.target_tokenizer(asked, job.tokenizer_type, job.source, model.directory, args)
        mine.append(find_tokenizer(None, {"tokenizer_model": mine[1]}, model.directory).size if mine[1] else None)
    training_args, tokenizer_model, tokenizer_type, carried, tokens = gather_objects(world, mine)[0]
    return arguments.TargetInputs(training_args, tokenizer_model, tokenizer_type, carried, model.vocab, own, tokens)
