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

from dist_convert.errors import (
    RESUME,
    ConversionError,
    DifferentModel,
    Interrupted,
    LostRank,
    SourceChanged,
    TargetError,
    ValueOverflow,
)
from dist_convert.options import fingerprint
from dist_convert.plan.content import Content, digest
from dist_convert.plan.copies import BLOCK_BYTES, bands, blocks_of_band
from dist_convert.plan.file_owners import file_numbers
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.discover import deal_headers
from dist_convert.read.source import BACK_OR_ANEW, changed_files
from dist_convert.records import TILE_COLUMNS, TargetFile, __version__, local_name, warnings_of
from dist_convert.write.commit import check_beside, check_target
from dist_convert.write.files import Place, reserve_file, sync, writing
from dist_convert.write.journal import (
    FEW_WINDOWS,
    JOURNAL_DIRECTORY,
    Journal,
    ResumeState,
    from_fields,
    has_written,
    journals,
    last_run,
    read_journal,
    resume_state_of,
    this_boot,
)
from dist_convert.write.manifest import manifest_of, what_differs
from dist_convert.write.partial import (
    FORMAT,
    RESUMABLE,
    VOID,
    aside_of,
    check_partial,
    damaged,
    forget,
    has_note,
    is_gone_on_with,
    is_made_of,
    is_ours,
    lock_target,
    look,
    place_of,
    refuse_exchanged,
    set_note,
)
from dist_convert.write.task import Task
from dist_convert.write.trees import remove

#: Of journals whose windows are few: each takes at least 20 bytes.
_FEW_BYTES = 4_000_000


def identity_of(task: Task) -> dict[str, Any]:
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
        "format": FORMAT,
        "plan": task.content.digest,
        "source": {file: list(known) for file, known in sorted(task.source.found.identity.items())},
        "settings": settings,
        "blocks": [BLOCK_BYTES, TILE_COLUMNS],
        "flags": where | fingerprint(task.job, task.source.format),
        "version": __version__,
    }


def facts_of(task: Task) -> dict[str, Any]:
    """What the manifest says of a conversion; of a divided target the same as of one that all nodes share."""
    known = identity_of(task)
    parts = ("size_bytes", "modified_ns", "header_sha256")
    files = {file: dict(zip(parts, values, strict=True)) for file, values in known["source"].items()}
    return {
        "format": FORMAT,
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
    return is_made_of(task.target, identity_of(task)) or (
        not task.job.overwrite and _what_differs(task, manifest_of(task.target)) == ""
    )


def _what_differs(task: Task, manifest: Mapping[str, Any]) -> str | None:
    return what_differs(task.target, manifest, facts_of(task), task.elsewhere)


def _sizes(task: Task) -> dict[str, int]:
    """The weights files where this rank's target lies, and their sizes in bytes."""
    return {local_name(file.name): file.size_bytes for file in task.files}


def is_unfinished(task: Task) -> bool:
    """Whether an earlier run has left what this one would go on with."""
    return is_gone_on_with(task.partial, identity_of(task), _sizes(task), overwrite=task.job.overwrite)


def check_start(task: Task) -> tuple[int, str]:
    """Check, without making anything, that the target can be made or gone on with.

    Returns:
        The free bytes of its disk, and what is there to be replaced (see `partial.look`).
    """
    # Before it is checked: what comes into its place meanwhile is another one at the end.
    replaces = (look(task.target) or look(aside_of(task.target))) if task.job.overwrite else ""
    manifest = manifest_of(task.target)  # read once, as it may be large
    different = _what_differs(task, manifest)
    if is_made_of(task.target, identity_of(task)) or (different == "" and not task.job.overwrite):
        return shutil.disk_usage(task.target).free, ""
    free_bytes = check_target(
        task.target,
        task.source.directory,
        manifest,
        overwrite=task.job.overwrite,
        needed_bytes=sum(_sizes(task).values()),
        different=different,
    )
    check_partial(task.target, identity_of(task), _sizes(task), overwrite=task.job.overwrite)
    check_beside(task.target, task.layout.beside())
    return free_bytes, replaces


def notes_on_replacing(task: Task) -> list[str]:
    """What `--overwrite` is going to remove, where `check_start` lets it."""
    is_there = task.target.is_dir() and any(task.target.iterdir())
    if not task.job.overwrite or not is_there or is_made_of(task.target, identity_of(task)):
        return []
    return [f"warning: replaces {task.target}, which an earlier conversion has made"]


def begin(task: Task, world: World, place: Place | None) -> tuple[ResumeState, Journal]:
    """Read what earlier runs did, make the target's files where they are not there, and open this rank's journal.

    `place` is that of `Held`.
    """
    partial, files = task.partial, task.files
    if task.is_first:
        refuse_exchanged(partial, place)
    _forget_what_is_void(task, world, place)
    run, read, odd = _read_journals(task, world)
    if odd and task.job.overwrite:
        if task.is_first:
            set_note(partial, VOID)
        gather_objects(world, None)
        _forget_what_is_void(task, world, place)
        run, read, odd = _read_journals(task, world)
    if odd:
        raise damaged(Path(odd[0]), "a journal that says what none does, or more than any")
    broken = [file.name for file in files if not _is_whole(partial, file)] if task.is_first else []
    resume_state = resume_state_of(read, {file for of_rank in gather_objects(world, broken) for file in of_rank})
    if task.is_first:
        refuse_exchanged(partial, place)
        task.layout.make_files(partial, files, is_first=world.rank == 0)
        for file in files:
            reserve_file(partial, local_name(file.name))
    journal = Journal(partial, run, world.rank, place)
    for name in broken if run > 1 else ():
        journal.lost(local_name(name), with_this_run=False)
    gather_objects(world, None)
    return resume_state, journal


def _read_journals(task: Task, world: World) -> tuple[int, list[dict[str, Any]], list[str]]:
    """The number of this run, what counts of the journals of all disks, and which of them are damaged."""
    partial, files = task.partial, task.files
    boots = gather_objects(world, list(this_boot()))
    listings: list[list[str]] = gather_objects(world, journals(partial))
    run = last_run(name for of_rank in listings for name in of_rank) + 1
    # Journals of two disks may have one name, and are two.
    seen = [{f"{disk}/{name}": 0 for name in of} for disk, of in zip(task.disks, listings, strict=True)]
    mine = deal_headers(sorted({name for of_rank in seen for name in of_rank}), seen)[world.rank]
    records, odd = [], []
    names = [name.partition("/")[2] for name in mine]
    most = _most_windows(task.content, sum((partial / JOURNAL_DIRECTORY / name).lstat().st_size for name in names))
    for name in names:
        record = read_journal(partial, name, boots, most)
        if record is None or not _fits(record, _sizes(task)):
            odd.append(str(partial / JOURNAL_DIRECTORY / name))
        else:
            records.append(_planned(record, files))
            most -= len(record["wrote"])
    gathered = gather_objects(world, [records, odd])
    return run, [one for of_rank, _ in gathered for one in of_rank], [one for _, of_rank in gathered for one in of_rank]


def _most_windows(content: Content, journal_bytes: int) -> int:
    """How many windows journals of so many bytes can have together; what is not needed is not counted."""
    if journal_bytes < _FEW_BYTES:
        return FEW_WINDOWS
    blocks = (
        block
        for transfer in content.transfers
        for band in bands(content.ends, transfer.names)
        for block in blocks_of_band(band, transfer.target_files)
    )
    # Twice: what was lost, or not forced to the disk in time, has been written again.
    return FEW_WINDOWS + 2 * sum(len(copy.targets) for block in blocks for copy in block)


def _fits(record: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    """Whether all that a journal has as written lies inside of its files."""
    windows = (from_fields(values)[0] for values in record["wrote"])
    return all(
        window.offset_bytes + (window.runs - 1) * window.stride_bytes + window.run_bytes
        <= sizes.get(window.file, sys.maxsize)
        for window in windows
    )


def _forget_what_is_void(task: Task, world: World, place: Place | None) -> None:
    """Where an earlier run noted on any disk that nothing counts of what was written, forget it on every disk."""
    if not any(gather_objects(world, has_note(task.partial, VOID))):
        return
    with writing(task.partial):
        if task.is_first:
            forget(task.partial, place)
        gather_objects(world, None)  # the note goes last: until then, the next run finds it
        if task.is_first:
            remove(task.partial, f"{JOURNAL_DIRECTORY}/{VOID}", place)
            sync(task.partial / JOURNAL_DIRECTORY)


def _planned(record: dict[str, Any], files: Iterable[TargetFile]) -> dict[str, Any]:
    """A journal's record with the plan's names of its disk's files, and of no others."""
    planned = {local_name(file.name): file.name for file in files}
    of_files = {
        kind: [[planned[file], *rest] for file, *rest in record[kind] if file in planned] for kind in ("wrote", "lost")
    }
    return record | of_files


def _is_whole(partial: Path, file: TargetFile) -> bool:
    path = partial / local_name(file.name)
    return path.is_file() and path.stat().st_size >= file.size_bytes


def check_source(task: Task, world: World) -> None:
    """Look at every source file once more: what was written counts only if none has changed since its header was read.

    Raises:
        SourceChanged: on every rank.
    """
    seen: list[list[str]] = gather_objects(world, changed_files(task.source.directory, task.source.found.listing))
    changed = sorted({file for of_rank in seen for file in of_rank})
    if not changed:
        return
    raise SourceChanged(
        "a source file has changed while it was read",
        file=changed[0],
        expected="the size and time that it had when the conversion began",
        found=f"others, as of {len(changed) - 1} more files" if changed[1:] else "others",
        remedy=BACK_OR_ANEW,
    )


@dataclass(frozen=True)
class Held:
    """What is known of a target that this conversion holds.

    Attributes:
        directory: where it lies on this rank's disk.
        unnamed: the first ranks of the disks where it has not got its name yet.
        is_complete: nothing is left to be written: on some disk it has its name already.
        place: which directory that is, where one of its ranks has locked it.
    """

    directory: Path
    unnamed: list[int]
    is_complete: bool
    place: Place | None


@contextlib.contextmanager
def held_target(task: Task, world: World) -> Iterator[Held]:
    """Hold the target for this conversion, see `partial.lock_target`; errors inside say how to go on with it."""
    lock, place, runs_before = None, None, 0
    is_named = task.is_first and has_name(task)
    if task.is_first and (not is_named or is_ours(task.target)):
        lock = lock_target(task.target, identity_of(task), _sizes(task), overwrite=task.job.overwrite)
    try:
        named: list[bool] = gather_objects(world, is_named)
        is_here = not named[task.disks.index(task.disks[task.rank])]
        directory = task.partial if is_here else task.target
        place = lock.place if lock else place_of(directory) if is_here else None
        runs_before = last_run(journals(task.partial))
        unnamed = [rank for rank in task.first_ranks if not named[rank]]
        yield Held(directory, unnamed, any(named), place)
    except ConversionError as error:
        if not isinstance(error, ValueOverflow | DifferentModel | SourceChanged):
            error.resume = RESUME
        with contextlib.suppress(OSError, TargetError):  # the same disk may refuse this too
            if place == place_of(task.partial) and is_ours(task.partial):
                _leave(task.partial, error, runs_before, place)
        raise
    finally:
        if lock is not None:
            lock.release()


def _leave(partial: Path, error: ConversionError, runs_before: int, place: Place) -> None:
    """Say beside what is unfinished what may become of it; any rank that sees it may.

    The next run may get further though nobody does anything after a fault of a disk or of a network, which may be over
    then; of one that stays, each run that meets it has less left to write before it, until one has nothing.
    """
    if isinstance(error, DifferentModel | SourceChanged):
        set_note(partial, VOID)
    may_pass = isinstance(error.__cause__, OSError) and has_written(partial, runs_before)
    if not may_pass and not isinstance(error, Interrupted | LostRank):
        remove(partial, RESUMABLE, place)
