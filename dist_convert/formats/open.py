"""Opens a checkpoint of whatever format it is, from the headers of its files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dist_convert.errors import CheckpointNotFound, InconsistentShards
from dist_convert.formats.dcp.open import open_dcp
from dist_convert.formats.foreign import refuse_foreign
from dist_convert.formats.format import Model
from dist_convert.formats.huggingface.config import config_of_like
from dist_convert.formats.huggingface.hub import local_directory, revision_on_hub
from dist_convert.formats.huggingface.open import open_huggingface, read_carried
from dist_convert.formats.huggingface.read import CONFIG_FILE, is_huggingface
from dist_convert.formats.megatron import iterations
from dist_convert.formats.meta.open import open_meta
from dist_convert.formats.meta.params import weights_files
from dist_convert.formats.torch.copies import settle_copies
from dist_convert.formats.torch.open import open_torch, read_shards
from dist_convert.formats.torch.shards import Shard
from dist_convert.formats.torch_dist.contents import is_of_megatron
from dist_convert.formats.torch_dist.open import open_torch_dist
from dist_convert.models.catalog import Where
from dist_convert.options import CONVERT, DCP, HUGGINGFACE, PAIRS, PATH_FLAGS, TORCH, TORCH_DIST, Options
from dist_convert.ranks.collectives import World, gather_objects, run_on
from dist_convert.read.dcp import METADATA_FILE, SUFFIX
from dist_convert.read.discover import Discovery
from dist_convert.read.source import no_directory
from dist_convert.records import JsonObject
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
    """The model that `find_iteration` finds; of rank files the headers may be read already. It raises what it does."""
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
    directory = shared_iteration(where, world)
    refuse_foreign(directory)
    mine = [iterations.has_rank_directories(directory), iterations.is_distributed(directory), is_of_megatron(directory)]
    is_torch, distributed, is_core = map(any, zip(*gather_objects(world, mine), strict=True))
    if is_torch and distributed:
        what = "two checkpoints in one directory, a torch and a distributed one"
        expected = f"either mp_rank_* directories, or {METADATA_FILE} and *{SUFFIX} files"
        raise InconsistentShards(what, directory, expected, found="both", remedy="move one to a directory of its own")
    return directory, TORCH if not distributed else TORCH_DIST if is_core else DCP


def open_source(job: Options, world: World) -> Model:
    """The model of a conversion's source, which a hub may have; a SourceError tells all that is wrong."""
    where = Where(Path(job.source), job, read_like(job.like, world))
    refuse_unfinished(where.path, job.ckpt_dir_name)
    refuse_foreign(where.path)
    if any(gather_objects(world, bool(weights_files(where.path)))):
        return open_meta(where, world)
    source = PAIRS[job.command][0] if job.command != CONVERT else ""
    if source == HUGGINGFACE or (not source and not any(gather_objects(world, where.path.is_dir()))):
        return open_huggingface(_fetch(job, world), world, drops_mtp=where.asked.drop_mtp)
    if source == TORCH:
        return open_iteration(where, *find_iteration(where, world), world)
    return open_checkpoint(where, world)


def read_like(path: Path | None, world: World) -> JsonObject | None:
    """What `config_of_like` reads, as rank 0 reads it."""
    if path is None:
        return None
    return gather_objects(world, config_of_like(path) if world.rank == 0 else None)[0]


def _fetch(job: Options, world: World) -> Path:
    """The model's directory. Rank 0 asks a hub, one rank of each machine fetches the same revision, all find it."""
    is_here = gather_objects(world, Path(job.source).is_dir())
    if all(is_here):
        return Path(job.source)
    if any(is_here):
        found = f"nothing on rank {is_here.index(False)}"
        expected = "a directory on every rank, with config.json and the weights files of that node"
        remedy = f"copy it there, or give a hub id; check {PATH_FLAGS[job.command][0]} on every node"
        raise CheckpointNotFound("the Hugging Face directory is not on every node", job.source, expected, found, remedy)
    name = gather_objects(world, revision_on_hub(job.source) if world.rank == 0 else "")[0]
    run_on(world, world.first_ranks, lambda: local_directory(name))
    return local_directory(name, cache_only=True)


def shared_iteration(where: Where, world: World) -> Path:
    """The iteration's directory; training leaves the tracker file on one node, so any rank's tracker speaks for all."""
    root, name, name_flag = where.path, where.asked.ckpt_dir_name, where.name_flag
    if name is None:
        tracked = [
            named for named in gather_objects(world, iterations.tracked_name(root, name_flag)) if named is not None
        ]
        if len(set(tracked)) > 1:
            what, found = "tracker files of different nodes name different iterations", ", ".join(sorted(set(tracked)))
            remedy = f"name the iteration with {name_flag}"
            raise InconsistentShards(what, iterations.TRACKER_FILE, found=found, remedy=remedy)
        name = tracked[0] if tracked else None
    if name is None or not any(gather_objects(world, (root / name).is_dir())):
        raise iterations.no_iteration(root, name, name_flag)
    return root / name
