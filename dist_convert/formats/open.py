"""Opens a checkpoint of whatever format it is, from the headers of its files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_convert.errors import CheckpointNotFound, InconsistentShards, UsageError, below
from dist_convert.formats.dcp.open import open_dcp
from dist_convert.formats.foreign import refuse_foreign
from dist_convert.formats.format import Model
from dist_convert.formats.huggingface.carried import read_carried
from dist_convert.formats.huggingface.config import architecture_from_config
from dist_convert.formats.huggingface.hub import local_directory, revision_on_hub
from dist_convert.formats.huggingface.open import open_huggingface
from dist_convert.formats.huggingface.read import CONFIG_FILE, is_huggingface, read_config
from dist_convert.formats.megatron.iterations import (
    TRACKER_FILE,
    has_rank_directories,
    is_distributed,
    iteration_directory,
    tracked_name,
)
from dist_convert.formats.meta.open import open_meta
from dist_convert.formats.meta.params import weights_files
from dist_convert.formats.torch.copies import settle_copies
from dist_convert.formats.torch.open import open_torch, read_shards
from dist_convert.formats.torch.shards import Shard
from dist_convert.formats.torch_dist.contents import is_torch_dist
from dist_convert.formats.torch_dist.open import open_torch_dist
from dist_convert.models.catalog import Where
from dist_convert.models.prediction import MTP_KEY
from dist_convert.options import CONVERT, DCP, HUGGINGFACE, PAIRS, PATH_FLAGS, TORCH, TORCH_DIST, Options
from dist_convert.ranks.channel import Control
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.dcp import METADATA_FILE, SUFFIX
from dist_convert.read.discover import Discovery
from dist_convert.read.source import no_directory, read_json
from dist_convert.write.partial import refuse_unfinished


def open_checkpoint(where: Where, world: World) -> Model:
    """Read the headers of a checkpoint; what one rank sees of it tells all which format it has.

    Raises:
        SourceError: all that the headers show to be wrong, or copies that differ.
    """
    refuse_foreign(where.path)
    if any(gather_objects(world, bool(weights_files(where.path)))):
        return open_meta(where, world)
    if any(gather_objects(world, is_huggingface(where.path))):
        return open_huggingface(where.path, world, drops_mtp=where.asked.drop_mtp)
    if any(gather_objects(world, where.path.is_dir())):
        return open_iteration(where, *find_iteration(where, world), world)
    raise no_directory(where.path, "checkpoint")


def open_iteration(
    where: Where, directory: Path, kind: str, world: World, headers: tuple[Discovery, Mapping[str, Shard]] | None = None
) -> Model:
    """Read the headers of what `find_iteration` finds, but those of rank files that are read already.

    Raises:
        SourceError: see `open_checkpoint`.
    """
    carried = gather_objects(world, read_carried(directory) if world.rank == 0 else {})[0]
    where = replace(where, carried=carried.get(CONFIG_FILE))
    if kind == TORCH:
        model = open_torch(where, directory, world, *(headers or read_shards(directory, world)))
        return settle_copies(model, where, world)
    return (open_torch_dist if kind == TORCH_DIST else open_dcp)(where, directory, world)


def find_iteration(where: Where, world: World) -> tuple[Path, str]:
    """The directory of a checkpoint, or of a Megatron checkpoint's iteration, as this rank sees it, and its format.

    Whether its root is another program's is asked before, by `refuse_foreign`.

    Raises:
        SourceError: there is none, or files of two formats.
        UnsupportedModel: it is of a format that is not read.
    """
    directory = _shared_iteration(where, world)
    refuse_foreign(directory)
    mine = [has_rank_directories(directory), is_distributed(directory), is_torch_dist(directory)]
    is_torch, distributed, is_core = map(any, zip(*gather_objects(world, mine), strict=True))
    if is_torch and distributed:
        raise InconsistentShards(
            "two checkpoints in one directory, a torch and a distributed one",
            file=str(directory),
            expected=f"either mp_rank_* directories, or {METADATA_FILE} and *{SUFFIX} files",
            found="both",
            remedy="move the files of one of them to a directory of their own",
        )
    if not distributed:
        return directory, TORCH
    return directory, TORCH_DIST if is_core else DCP


def open_source(job: Options, world: World, channel: Control) -> Model:
    """Read the headers of a conversion's source, which a hub may have.

    Raises:
        SourceError: there is none, or all that the headers show to be wrong.
    """
    where = Where(Path(job.source), job, read_like(job.like, world))
    refuse_unfinished(where.path, job.ckpt_dir_name)
    refuse_foreign(where.path)
    if any(gather_objects(world, bool(weights_files(where.path)))):
        return open_meta(where, world)
    source = PAIRS[job.command][0] if job.command != CONVERT else ""
    if source == HUGGINGFACE or (not source and not any(gather_objects(world, where.path.is_dir()))):
        return open_huggingface(_fetch(job, world, channel), world, drops_mtp=where.asked.drop_mtp)
    if source == TORCH:
        return open_iteration(where, *find_iteration(where, world), world)
    return open_checkpoint(where, world)


def read_like(path: Path | None, world: World) -> Mapping[str, Any] | None:
    """The content of the config.json that `--like` names, as rank 0 reads it; it may name the file or its directory.

    Raises:
        UsageError, CorruptFile, UnsupportedModel: there is none, or it is damaged or no model's.
    """
    if path is None:
        return None
    mine = None
    if world.rank == 0:
        if not path.exists():
            raise UsageError("what --like names is not there", file=str(path), remedy="check the path")
        directory, name = (path, CONFIG_FILE) if path.is_dir() else (path.parent, path.name)
        with below(directory, name):  # which is known here alone
            mine = read_config(path) if path.is_dir() else read_json(path)
            architecture_from_config({**mine, MTP_KEY.config: 0}, zero_output_bias=True)
    shared: Mapping[str, Any] = gather_objects(world, mine)[0]
    return shared


def _fetch(job: Options, world: World, channel: Control) -> Path:
    """The model's directory. Rank 0 asks a hub, one rank of each machine fetches the same revision, all find it."""
    is_here: list[bool] = gather_objects(world, Path(job.source).is_dir())
    if all(is_here):
        return Path(job.source)
    if any(is_here):
        raise CheckpointNotFound(
            "the Hugging Face directory is not on every node",
            file=job.source,
            expected="a directory on every rank, with config.json and those of the weights files that are there",
            found=f"nothing on rank {is_here.index(False)}",
            remedy=f"copy it there, or give a hub id; check {PATH_FLAGS[job.command][0]} on every node",
        )
    name: str = gather_objects(world, revision_on_hub(job.source) if world.rank == 0 else "")[0]
    channel.run_on(world.first_ranks, "fetching the model", lambda: local_directory(name), job.timeout_seconds)
    return local_directory(name, cache_only=True)


def _shared_iteration(where: Where, world: World) -> Path:
    """The iteration's directory; training leaves the tracker file on one node, so any rank's tracker speaks for all.

    Raises:
        InconsistentShards: trackers name different iterations.
        CheckpointNotFound, UnsupportedModel: see `iteration_directory`, where no rank has the directory.
    """
    root, name, name_flag = where.path, where.asked.ckpt_dir_name, where.name_flag
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
    if name is None or not any(gather_objects(world, (root / name).is_dir())):
        return iteration_directory(root, name, name_flag)
    return root / name
