"""Where a conversion begins, anew or where an earlier run was stopped, and how its target is held while it is made.

On each disk of the target (one on a shared file system, one for each node where nodes keep their own shards) the
first rank takes the partial directory. Every journal is read by one rank that sees it, and all ranks learn what is
done.

The mark `resumable` says to job scripts that starting the same command again may be all it takes. It stays behind
whoever is killed. A rank that ends with an error takes it away where somebody has to do something first.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_convert import errors
from dist_convert.options import fingerprint
from dist_convert.plan.content import Content, digest
from dist_convert.plan.copies import BLOCK_BYTES, bands, blocks_of_band
from dist_convert.plan.file_owners import file_numbers
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.discover import deal_headers
from dist_convert.read.source import BACK_OR_ANEW, changed_files
from dist_convert.records import TILE_COLUMNS, JsonObject, TargetFile, __version__, local_name, warnings_of
from dist_convert.write import journal as journaling
from dist_convert.write import partial as partials
from dist_convert.write.commit import check_beside, check_target
from dist_convert.write.files import Directory, held, reserve_file, sync, writing
from dist_convert.write.manifest import manifest_of, what_differs
from dist_convert.write.task import Task
from dist_convert.write.trees import found_below, make_parents, remove

#: Of journals whose windows are few: each takes at least 20 bytes.
_FEW_BYTES = 4_000_000


def identity_of(task: Task) -> JsonObject:
    """What an unfinished target must have been made from, for this conversion to go on with it, in JSON values.

    `plan` is the digest of the content, `source` has the size, the time of the last change in ns and the digest of the
    header of each file, `settings` what else the bytes of weights files depend on, and `blocks` how they are cut, as
    what is done with gaps is found again only in blocks of the same size. `flags` and `version` only say what changed.
    """
    where = {"source": task.job.source, "target": str(task.job.target)}
    settings = dict(task.layout.settings)
    if task.is_divided:
        settings["weights files here"] = file_numbers(task.content, task.writable[task.rank])
    return {
        "format": partials.FORMAT,
        "plan": task.content.digest,
        "source": {file: list(known) for file, known in sorted(task.source.found.identity.items())},
        "settings": settings,
        "blocks": [BLOCK_BYTES, TILE_COLUMNS],
        "flags": where | fingerprint(task.job, task.source.format),
        "version": __version__,
    }


def facts_of(task: Task) -> JsonObject:
    """What the manifest says of a conversion; of a divided target the same as of one that all nodes share."""
    known = identity_of(task)
    parts = ("size_bytes", "modified_ns", "header_sha256")
    files = {file: dict(zip(parts, values, strict=True)) for file, values in known["source"].items()}
    return {
        "format": partials.FORMAT,
        "conversion": f"{task.source.format} to {task.job.to}",
        "versions": {"dist_convert": __version__, "torch": torch.__version__},
        "plan": known["plan"],
        "settings": digest(dict(task.layout.settings)),
        "flags": fingerprint(task.job, task.source.format),
        "warnings": warnings_of(task.notes),
        "source": {"path": str(task.source.directory.absolute()), "files": files},
    }


def has_name(task: Task) -> bool:
    """Whether the target is there, complete, by an earlier run of this conversion, settled or not."""
    return partials.is_made_of(task.target, identity_of(task)) or (
        not task.job.overwrite and _what_differs(task, manifest_of(task.target)) == ""
    )


def _what_differs(task: Task, manifest: JsonObject) -> str | None:
    return what_differs(task.target, manifest, facts_of(task), task.elsewhere)


def _sizes(task: Task) -> dict[str, int]:
    """The weights files where this rank's target lies, and their sizes in bytes."""
    return {local_name(file.name): file.size_bytes for file in task.files}


def is_unfinished(task: Task) -> bool:
    """Whether an earlier run has left what this one would go on with."""
    return partials.is_gone_on_with(task.partial, identity_of(task), _sizes(task), overwrite=task.job.overwrite)


def check_start(task: Task) -> tuple[int, str]:
    """Check, without making anything, that the target can be made or gone on with.

    Returns:
        The free bytes of its disk, and what is there to be replaced (see `partial.look`).
    """
    # Before it is checked: what comes into its place meanwhile is another one at the end.
    replaces = (
        (partials.look(task.target) or partials.look(partials.aside_of(task.target))) if task.job.overwrite else ""
    )
    manifest = manifest_of(task.target)  # read once, as it may be large
    different = _what_differs(task, manifest)
    if partials.is_made_of(task.target, identity_of(task)) or (different == "" and not task.job.overwrite):
        return shutil.disk_usage(task.target).free, ""
    free_bytes = check_target(
        task.target,
        task.source.directory,
        manifest,
        overwrite=task.job.overwrite,
        needed_bytes=sum(_sizes(task).values()),
        different=different,
    )
    with contextlib.suppress(FileNotFoundError), partials.held_partial(task.partial) as partial:
        partials.check_partial(partial, identity_of(task), _sizes(task), overwrite=task.job.overwrite)
    check_beside(task.target, task.layout.beside())
    return free_bytes, replaces


def notes_on_replacing(task: Task) -> list[str]:
    """What `--overwrite` is going to remove, where `check_start` lets it."""
    is_there = task.target.is_dir() and any(task.target.iterdir())
    if not task.job.overwrite or not is_there or partials.is_made_of(task.target, identity_of(task)):
        return []
    return [f"warning: {task.target} will be replaced; an earlier conversion made it"]


def begin(task: Task, world: World, partial: Directory) -> tuple[journaling.ResumeState, journaling.Journal]:
    """Read what earlier runs did, make the target's files where they are not there, and open this rank's journal."""
    files = task.files
    _forget_what_is_void(partial, task, world)
    run, read, odd = _read_journals(partial, task, world)
    if odd and task.job.overwrite:
        if task.is_first:
            partials.set_note(partial, partials.VOID)
        gather_objects(world, None)
        _forget_what_is_void(partial, task, world)
        run, read, odd = _read_journals(partial, task, world)
    if odd:
        raise partials.damaged(Path(odd[0]), "a journal with impossible entries, or too many")
    sizes = partials.files_below(partial) if task.is_first else _sizes(task)
    broken = [file.name for file in files if sizes.get(local_name(file.name), -1) < file.size_bytes]
    resume_state = journaling.resume_state_of(
        read, {file for of_rank in gather_objects(world, broken) for file in of_rank}
    )
    if task.is_first:
        task.layout.make_files(partial, files, is_first=world.rank == 0)
        for file in files:
            reserve_file(partial, local_name(file.name))
    journal = journaling.Journal(partial, run, world.rank)
    for name in broken if run > 1 else ():
        journal.lost(local_name(name), with_this_run=False)
    gather_objects(world, None)
    return resume_state, journal


def _read_journals(partial: Directory, task: Task, world: World) -> tuple[int, list[JsonObject], list[str]]:
    """The number of this run, what counts of the journals of all disks, and which of them are damaged."""
    boots = gather_objects(world, list(journaling.this_boot()))
    listings = gather_objects(world, journaling.journals(partial))
    run = journaling.last_run(name for of_rank in listings for name in of_rank) + 1
    # Journals of two disks may have one name, and are two.
    seen = [{f"{disk}/{name}": 0 for name in of} for disk, of in zip(task.disks, listings, strict=True)]
    mine = deal_headers(sorted({name for of_rank in seen for name in of_rank}), seen)[world.rank]
    records, odd = [], []
    names = [name.partition("/")[2] for name in mine]
    found = found_below(partial, journaling.JOURNAL_DIRECTORY) if names else {}
    most = _most_windows(task.content, sum(found[f"{journaling.JOURNAL_DIRECTORY}/{name}"].st_size for name in names))
    for name in names:
        record = journaling.read_journal(partial, name, boots, most)
        if record is None or not _fits(record, _sizes(task)):
            odd.append(str(partial / f"{journaling.JOURNAL_DIRECTORY}/{name}"))
        else:
            records.append(_planned(record, task.files))
            most -= len(record["wrote"])
    gathered = gather_objects(world, (records, odd))
    return run, [one for of_rank, _ in gathered for one in of_rank], [one for _, of_rank in gathered for one in of_rank]


def _most_windows(content: Content, journal_bytes: int) -> int:
    """How many windows journals of so many bytes can have together; what is not needed is not counted."""
    if journal_bytes < _FEW_BYTES:
        return journaling.FEW_WINDOWS
    blocks = (
        block
        for transfer in content.transfers
        for band in bands(content.ends, transfer.names)
        for block in blocks_of_band(band, transfer.target_files)
    )
    # Twice: what was lost, or not forced to the disk in time, has been written again.
    return journaling.FEW_WINDOWS + 2 * sum(len(copy.targets) for block in blocks for copy in block)


def _fits(record: JsonObject, sizes: Mapping[str, int]) -> bool:
    """Whether all that a journal has as written lies inside of its files."""
    windows = (journaling.from_fields(values)[0] for values in record["wrote"])
    return all(
        window.offset_bytes + (window.runs - 1) * window.stride_bytes + window.run_bytes
        <= sizes.get(window.file, sys.maxsize)
        for window in windows
    )


def _forget_what_is_void(partial: Directory, task: Task, world: World) -> None:
    """Where an earlier run noted on any disk that nothing counts of what was written, forget it on every disk."""
    if not any(gather_objects(world, partials.has_note(partial, partials.VOID))):
        return
    with writing(task.partial):
        if task.is_first:
            partials.forget(partial)
        gather_objects(world, None)  # the note goes last: until then, the next run finds it
        if task.is_first:
            remove(partial, f"{journaling.JOURNAL_DIRECTORY}/{partials.VOID}")
            sync(partial, journaling.JOURNAL_DIRECTORY)


def _planned(record: dict[str, Any], files: Iterable[TargetFile]) -> dict[str, Any]:
    """A journal's record with the plan's names of its disk's files, and of no others."""
    planned = {local_name(file.name): file.name for file in files}
    of_files = {
        kind: [[planned[file], *rest] for file, *rest in record[kind] if file in planned] for kind in ("wrote", "lost")
    }
    return record | of_files


def check_source(task: Task, world: World) -> None:
    """Compare every source file with what it was when its header was read; a SourceChanged, on every rank."""
    seen = gather_objects(world, changed_files(task.source.directory, task.source.found.listing))
    changed = sorted({file for of_rank in seen for file in of_rank})
    if not changed:
        return
    what = "a source file has changed while it was read"
    expected = "the size and time that it had when the conversion began"
    found = f"changed, as in {len(changed) - 1} more files" if changed[1:] else "changed"
    raise errors.SourceChanged(what, changed[0], expected, found, remedy=BACK_OR_ANEW)


@dataclass(frozen=True)
class Held:
    """A target that this conversion holds, as one rank sees it.

    Attributes:
        directory: where it lies on this rank's disk: its partial directory, or the target that has its name.
        parent: what holds that.
        unnamed: the first ranks of the disks where it has not got its name yet.
        is_complete: nothing is left to be written: on some disk it has its name already.
    """

    directory: Directory
    parent: Directory
    unnamed: list[int]
    is_complete: bool


def _is_settled(task: Task) -> bool:
    """Whether the target has its name on this disk, and its journal no more, where it has its name on another one.

    If it has not, only its name is missing, as every disk was complete before one had the target under its name.

    Raises:
        ResumeRefused: it has gone, or was changed, since then.
    """
    if partials.is_made_of(task.partial, identity_of(task)):
        manifest = manifest_of(task.partial)
        if what_differs(task.partial, manifest, facts_of(task), task.elsewhere) == "":
            return False
    if _what_differs(task, manifest_of(task.target)) == "":
        return True
    what = "the target is complete on other disks, but no longer on this one"
    remedy = "move it away on every node, then start the same command again; or choose another target"
    raise errors.ResumeRefused(what, task.target, expected=f"it, or all of it in {task.partial}", remedy=remedy)


@contextlib.contextmanager
def held_target(task: Task, world: World) -> Iterator[Held]:
    """Hold the target for this conversion, see `partial.locked_target`; errors inside say how to go on with it."""
    parent = directory = None
    above = task.target.absolute().parent
    is_named, runs_before = task.is_first and has_name(task), 0
    is_complete = any(gather_objects(world, is_named))
    if is_complete and task.is_first and not is_named:
        is_named = _is_settled(task)
    with contextlib.ExitStack() as stack:
        if task.is_first:
            with writing(task.partial):
                make_parents(task.partial)
                parent = stack.enter_context(held(above.resolve()))
            if not is_named or partials.is_ours(task.target):
                sizes, overwrite = _sizes(task), task.job.overwrite and not is_complete
                locked = partials.locked_target(task.target, parent, identity_of(task), sizes, overwrite=overwrite)
                directory = stack.enter_context(locked)
        try:
            lock = partials.read_note(directory, partials.LOCK) if directory else ""
            locks = gather_objects(world, (is_named, lock))
            is_named, lock = locks[task.disks.index(task.disks[task.rank])]
            with writing(task.partial):
                parent = parent or stack.enter_context(held(above.resolve()))
                if directory is None and is_named:
                    directory = stack.enter_context(held(task.target.resolve()))
                elif directory is None:
                    directory = stack.enter_context(partials.held_partial(task.partial, parent))
                    if partials.read_note(directory, partials.LOCK) != lock:  # no two have the same
                        raise partials.exchanged(task.partial)
            runs_before = journaling.last_run(journaling.journals(directory))
            unnamed = [rank for rank in task.first_ranks if not locks[rank][0]]
            yield Held(directory, parent, unnamed, is_complete)
        except errors.ConversionError as error:
            if not isinstance(error, errors.ValueOverflow | errors.DifferentModel | errors.SourceChanged):
                error.resume = errors.RESUME
            with contextlib.suppress(OSError, errors.TargetError):  # the same disk may refuse this too
                if directory and not is_named and partials.is_ours(directory):
                    _leave(directory, error, task.rank, runs_before)
            raise


def _leave(partial: Directory, error: errors.ConversionError, rank: int, runs_before: int) -> None:
    """Say beside what is unfinished what may become of it; any rank that sees it may.

    The next run may get further though nobody does anything after a fault of a disk or of a network, which may be over
    then. One that stays is met again by the first step of its rank, before that has written anything.
    """
    if isinstance(error, errors.DifferentModel | errors.SourceChanged):
        partials.set_note(partial, partials.VOID)
    may_pass = isinstance(error.__cause__, OSError) and journaling.has_written(partial, rank, runs_before)
    if not may_pass and not isinstance(error, errors.Interrupted | errors.LostRank):
        remove(partial, partials.RESUMABLE)
