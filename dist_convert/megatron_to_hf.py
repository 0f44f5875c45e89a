"""Megatron to Hugging Face: what is read, what is written, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dist_convert.errors import InconsistentShards
from dist_convert.formats.huggingface.metadata import write_metadata
from dist_convert.formats.megatron.args import architecture_from_args, true_vocab
from dist_convert.formats.megatron.capacity_bins import Bin, read_bins
from dist_convert.job import TARGET_DTYPES, Job
from dist_convert.plan.content import Content, plan_to_huggingface
from dist_convert.plan.file_owners import deal_files, file_numbers, with_own_targets
from dist_convert.plan.megatron import check_same_run
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.discover import Discovery, discover
from dist_convert.read.megatron import (
    NAME_FLAG,
    TRACKER_FILE,
    Shard,
    iteration_directory,
    rank_files,
    read_shard,
    shard_from_json,
    shard_to_json,
    tracked_name,
)
from dist_convert.report import notes_on
from dist_convert.task import Task
from dist_convert.tokenizer.find import find_tokenizer
from dist_convert.tokenizer.huggingface import is_huggingface
from dist_convert.tokenizer.record import Tokenizer, how_to_add_tokenizer, style_for
from dist_convert.tokenizer.write import write_tokenizer
from dist_convert.units import human_bytes
from dist_convert.write.checksums import KnownRange
from dist_convert.write.hub import check_upload
from dist_convert.write.partial import refuse_unfinished
from dist_convert.write.places import find_places, refuse_several_places
from dist_convert.write.safetensors_files import make_files


def megatron_to_hf(job: Job, world: World) -> Task:
    """Read the shards' headers and work out the Hugging Face directory that they become.

    Raises:
        SourceError: all that the headers show to be wrong.
        UploadError: what can be known now of an upload that would not start.
    """
    notes = []
    if job.push_to_hub and world.rank == 0:
        notes.append(check_upload(job.save_path, job.push_to_hub, private=job.private))
    refuse_unfinished(job.load_path, job.ckpt_dir_name)
    directory = shared_iteration(job.load_path, job.ckpt_dir_name, world)
    found, shards = discover_shards(directory, world)
    file = min(shards)
    args = shards[file].args
    tokenizer = _share_tokenizer(job, world, args, directory)
    padded = architecture_from_args(args, vocab=None, file=file).padded_vocab
    vocab, _ = true_vocab(flag=job.true_vocab_size, args=args, tokenizer=tokenizer.size, padded=padded, file=file)
    if job.push_to_hub and tokenizer.kind == "none":
        notes.append("warning: the model is uploaded without a tokenizer")
    content = plan_to_huggingface(
        shards,
        architecture_from_args(args, vocab=vocab, file=file),
        target_dtype=TARGET_DTYPES[job.target_params_dtype],
        max_shard_size_bytes=job.max_shard_size_bytes,
        imported_experts=job.habana_imported_experts,
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
    style = style_for(tokenizer, content.side.architecture, job.source_model_type, instruct=job.instruct)

    def make_all_files(partial: Path) -> None:
        if world.rank == 0:
            write_tokenizer(tokenizer, style, partial)  # before the weights, so that what fails here fails early
        make_files(partial, [file for file in content.files if file.name in writable[world.rank]])

    def finish(partial: Path, known: Mapping[str, Sequence[KnownRange]]) -> None:
        if world.rank == 0:
            together = [bin for of_rank in bins for bin in of_rank]
            write_metadata(partial, job, content, directory, args, tokenizer, style, together)

    def last_words() -> str:
        if job.push_to_hub:  # after an upload it is said there
            return ""
        to_do = [
            f"{job.save_path} is a part of the model on each of {len(of_places)} disks: copy them into one directory"
        ]
        to_do = to_do if is_divided else []
        if not is_huggingface(job.save_path):
            model_type = job.source_model_type
            to_do.append(how_to_add_tokenizer(tokenizer, job.save_path, instruct=job.instruct, model_type=model_type))
        return "\n".join(filter(None, to_do))

    return Task(
        content=content,
        direction="megatron-to-hf",
        source=directory,
        source_identity=found.identity,
        source_listing=found.listing,
        settings={},
        visible=found.visible,
        target=job.save_path,
        places=places,
        writable=writable,
        target_flag="--save-path",
        notes=notes
        + notes_on(job, content, shards, tokenizer, style)
        + _notes_on_places(job, content, places, of_places),
        make_files=make_all_files,
        finish=finish,
        publish=lambda: None,
        last_words=last_words,
        is_divided=is_divided,
    )


def _places(job: Job, world: World) -> tuple[int, ...]:
    """For each rank, the number of the place where its target lies.

    Raises:
        TargetError: nodes see different targets, and no flag says that this is meant.
    """
    places = find_places(world, job.save_path, "--save-path")
    if not job.save_per_node:
        refuse_several_places(
            places, job.save_path, "--save-path", ", or give --save-per-node if each node is to keep some of the files"
        )
    return places


def _notes_on_places(
    job: Job, content: Content, places: Sequence[int], of_places: Sequence[frozenset[str]]
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


def discover_shards(directory: Path, world: World) -> tuple[Discovery, dict[str, Shard]]:
    """Every shard's header, by file, whichever rank sees it.

    Raises:
        SourceError: no shard is here, or they are not of one run.
    """
    found = discover(
        world,
        directory,
        rank_files(directory) if directory.is_dir() else (),
        lambda file: shard_to_json(read_shard(directory / file, file)),
        expected=f"mp_rank_00/model_optim_rng.pt or the like in {directory}",
    )
    shards = {file: shard_from_json(header) for file, header in found.headers.items()}
    check_same_run(shards.values())
    return found, shards


def shared_iteration(root: Path, name: str | None, world: World, name_flag: str = NAME_FLAG) -> Path:
    """The iteration's directory; training leaves the tracker file on one node, so any rank's tracker speaks for all.

    Args:
        root, name, name_flag: see `iteration_directory`.
        world: this rank.

    Raises:
        InconsistentShards: trackers name different iterations.
        CheckpointNotFound, UnsupportedModel: see `iteration_directory`, where no rank has the directory.
    """
    if name is None:
        tracked = [named for named in gather_objects(world, tracked_name(root, name_flag)) if named is not None]
        if len(set(tracked)) > 1:
            raise InconsistentShards(
                "tracker files of different nodes name different iterations",
                file=TRACKER_FILE,
                found=", ".join(sorted(set(tracked))),
                remedy=f"name the iteration with {name_flag}",
            )
        name = tracked[0] if tracked else None
    is_here = name is not None and (root / name).is_dir()
    anywhere = any(gather_objects(world, is_here))
    if is_here or not anywhere:
        return iteration_directory(root, name, name_flag)
    return root / name if name else root


def _share_tokenizer(job: Job, world: World, args: Mapping[str, Any], directory: Path) -> Tokenizer:
    """Rank 0's view of the tokenizer: its path may exist there only, and all ranks must plan alike."""
    found = find_tokenizer(job.tokenizer, args, directory) if world.rank == 0 else Tokenizer("none")
    shared = gather_objects(world, asdict(replace(found, path=None)))[0]
    return Tokenizer(**{**shared, "path": found.path})
