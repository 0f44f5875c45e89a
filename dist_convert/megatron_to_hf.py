"""Megatron to Hugging Face: what is read, what is written, and what is said about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_convert.formats.huggingface.catalog import catalog_of_files, target_tensors
from dist_convert.formats.huggingface.target import HuggingFaceTarget
from dist_convert.formats.torch.capacity_bins import Bin, read_bins
from dist_convert.formats.torch.open import open_torch
from dist_convert.model import Where
from dist_convert.options import TARGET_DTYPES, Options
from dist_convert.plan.content import Content, plan_content
from dist_convert.plan.file_owners import deal_files, file_numbers, with_own_targets
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.report import notes_on
from dist_convert.task import Task
from dist_convert.tokenizer.record import style_for
from dist_convert.units import human_bytes
from dist_convert.write.hub import check_upload
from dist_convert.write.partial import refuse_unfinished
from dist_convert.write.places import find_places, refuse_several_places
from dist_convert.write.safetensors_files import lay_out_files


def megatron_to_hf(job: Options, world: World) -> Task:
    """Read the shards' headers and work out the Hugging Face directory that they become.

    Raises:
        SourceError: all that the headers show to be wrong.
        UploadError: what can be known now of an upload that would not start.
    """
    notes = []
    if job.push_to_hub and world.rank == 0:
        notes.append(check_upload(job.target, job.push_to_hub, private=job.private))
    refuse_unfinished(Path(job.source), job.ckpt_dir_name)
    where = Where(Path(job.source), job.ckpt_dir_name, job.habana_imported_experts, job.true_vocab_size, job.tokenizer)
    model = open_torch(where, world)
    directory, found, shards, args, tokenizer = model.directory, model.found, model.shards, model.args, model.tokenizer
    if job.push_to_hub and tokenizer.kind == "none":
        notes.append("warning: the model is uploaded without a tokenizer")
    source, left_behind = model.catalog()
    target_dtype = TARGET_DTYPES[job.target_params_dtype]
    files = lay_out_files(target_tensors(source, source.params_dtype, target_dtype), job.max_shard_size_bytes)
    content = plan_content(
        source,
        catalog_of_files(source.architecture, files),
        files,
        title=source.title,
        params_dtype=source.params_dtype,
        target_dtype=target_dtype,
        kept_dtypes=source.kept_dtypes,
        left_behind=left_behind,
    )

    places = _places(job, world)
    of_places: tuple[frozenset[str], ...] = (frozenset(file.name for file in content.files),)
    is_divided = bool(max(places))
    if is_divided:
        content = with_own_targets(content)
        of_places = deal_files(content, found.visible, places)
    writable = tuple(of_places[place] for place in places)
    mine = [shards[name] for name in found.headers_of[world.rank]]
    bins: list[list[Bin]] = gather_objects(world, read_bins(directory, mine) if job.save_capacity_bins else [])
    style = style_for(tokenizer, source.architecture, job.source_model_type, instruct=job.instruct)

    together = [bin for of_rank in bins for bin in of_rank]
    return Task(
        content=content,
        direction="megatron-to-hf",
        source=directory,
        source_identity=found.identity,
        source_listing=found.listing,
        visible=found.visible,
        target=job.target,
        places=places,
        writable=writable,
        target_flag="--save-path",
        notes=notes
        + notes_on(job, content, source.architecture, shards, tokenizer, style)
        + _notes_on_places(job, content, places, of_places),
        layout=HuggingFaceTarget(
            job, content, source, directory, args, tokenizer, style, together, disks=len(of_places)
        ),
        is_divided=is_divided,
    )


def _places(job: Options, world: World) -> tuple[int, ...]:
    """For each rank, the number of the place where its target lies.

    Raises:
        TargetError: nodes see different targets, and no flag says that this is meant.
    """
    places = find_places(world, job.target, "--save-path")
    if not job.save_per_node:
        refuse_several_places(
            places, job.target, "--save-path", ", or give --save-per-node if each node is to keep some of the files"
        )
    return places


def _notes_on_places(
    job: Options, content: Content, places: Sequence[int], of_places: Sequence[frozenset[str]]
) -> list[str]:
    if not job.save_per_node:
        return []
    if len(of_places) == 1:
        return ["--save-per-node has no effect: all ranks see one and the same --save-path"]
    notes = []
    for place, files in enumerate(of_places):
        ranks = [str(rank) for rank, of_rank in enumerate(places) if of_rank == place]
        size_bytes = sum(file.size_bytes for file in content.files if file.name in files)
        notes.append(
            f"own disk of {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)}: weights files "
            f"{file_numbers(content, files)} of {len(content.files)}, {human_bytes(size_bytes)}"
        )
    return notes
