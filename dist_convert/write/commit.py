"""The target directory: whether it can be made, and how it gets its name when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from dist_convert.errors import NotEnoughSpace, TargetError, TargetExists, UsageError
from dist_convert.records import counted
from dist_convert.write.files import sync, writing
from dist_convert.write.journal import JOURNAL_DIRECTORY, Journal
from dist_convert.write.manifest import MANIFEST_FILE, manifest_of
from dist_convert.write.partial import (
    REPLACES,
    RESUMABLE,
    aside_of,
    files_below,
    has_note,
    partial_of,
    set_note,
    used_bytes,
)


def check_target(
    target: Path, source: Path, *, overwrite: bool, needed_bytes: int, different: str | None = None
) -> int:
    """Check that the target can be made, and return the free bytes of its file system.

    Args:
        target: final path.
        source: the checkpoint, which must not lie inside the target, nor the target inside it.
        overwrite: whether an existing target may be replaced, if a conversion has made it.
        needed_bytes: of all files together; an existing target's space is not free before the end.
        different: in what a complete conversion that is there is another one, for messages.

    Raises:
        TargetExists, TargetError, NotEnoughSpace
        UsageError: source and target lie in one another.
    """
    file, another = str(target), "choose another target"
    if target.exists() and not target.is_dir():
        raise TargetExists("the target is a file", file=file, remedy=another)
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if there and not overwrite:
        instead = "replace it with --overwrite" if manifest_of(target) else "remove the directory yourself"
        raise TargetExists(
            "the target directory is not empty",
            file=file,
            expected="a new or empty directory",
            found=f"a conversion: {different}"
            if different
            else counted(len(there), "file or directory", "files and directories"),
            remedy=f"{another}, or {instead}",
        )
    if there and not manifest_of(target):
        raise TargetExists(
            "no conversion has made the target directory, so it is not replaced",
            file=file,
            expected=f"{MANIFEST_FILE}, which an earlier conversion leaves",
            found=", ".join(there[:6]),
            remedy=f"{another}, or remove the directory yourself",
        )
    for used in (target, partial_of(target), aside_of(target)):
        if source.resolve().is_relative_to(used.resolve()):
            remedy = f"{another}; its name, and its name with .partial and .replaced, are written to"
            what = "the source lies where the target is made"
            raise UsageError(what, file=str(used), found=str(source), remedy=remedy)
    if target.resolve().is_relative_to(source.resolve()):
        expected = f"a directory outside of {source}"
        raise UsageError("the target lies in its own source", file=file, expected=expected, remedy=another)
    if aside_of(target).exists() and not has_note(partial_of(target), REPLACES):
        raise TargetExists(
            "what an interrupted replacement moved aside is still there",
            file=str(aside_of(target)),
            remedy="rename or remove it; it may be the only copy of a model",
        )
    parent = existing_parent(target)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        found = f"{parent} is no directory or is write-protected"
        raise TargetError(
            "the target cannot be made here", file=file, found=found, remedy=f"{another}, or make it writable"
        )
    space = os.statvfs(parent)
    free_bytes = space.f_bavail * space.f_frsize + used_bytes(partial_of(target))
    if free_bytes < needed_bytes:
        raise NotEnoughSpace(
            "not enough free space for the target",
            file=file,
            expected=f"{needed_bytes} bytes",
            found=f"{free_bytes} bytes free",
            remedy=f"free space, or {another}",
        )
    return free_bytes


def existing_parent(target: Path) -> Path:
    """The nearest thing above a path that is there: a directory, or what is in its way."""
    return next(parent for parent in target.absolute().parents if os.path.lexists(parent))


def sync_files(directory: Path, names: Sequence[str], journal: Journal) -> None:
    """Force what this machine wrote of the named files to the disk."""
    for name in names:
        with journal.syncing(name):
            sync(directory / name)


def commit(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Give the partial directory its final name; a target that is replaced moves aside first.

    The journal stays inside until `settle`: by it a run that finds the target knows what is left to do.

    Raises:
        TargetExists: a target appeared while the conversion ran, and `overwrite` is false.
        TargetError, NotEnoughSpace: the file system refuses; a target that was moved aside has its name back.
    """
    aside = aside_of(target)
    with writing(target):
        files = [partial / name for name in files_below(partial)]
        for path in (*files, *{path.parent for path in files}):
            sync(path)
        (partial / RESUMABLE).unlink(missing_ok=True)
        sync(partial)
        replaced = target.exists() and any(target.iterdir())
        if replaced:
            if not overwrite:
                raise TargetExists("the target appeared during the conversion", file=str(target))
            set_note(partial, REPLACES)
            target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            if replaced:
                aside.rename(target)
            raise
        sync(target.absolute().parent)


def settle(target: Path) -> None:
    """The last step of a conversion: remove what it replaced, and its journal, but for what `sweep` has to wait for."""
    aside, journal = aside_of(target), target / JOURNAL_DIRECTORY
    with writing(target):
        if has_note(target, REPLACES) and os.path.lexists(aside):
            aside.unlink() if aside.is_symlink() else shutil.rmtree(aside)
        sweep(target)
        for left in target.parent.glob(f".{partial_of(target).name}-*"):
            shutil.rmtree(left, ignore_errors=True)  # of runs that were killed when they began
        if journal.exists():
            for diary in journal.glob("run-*"):
                diary.unlink()
            journal.rename(_old_journal(target))  # all the rest at once
            sweep(target)


def sweep(target: Path) -> None:
    """Remove the journal that `settle` has put aside.

    Network file systems keep a file that is removed while it is open, as the lock is: call it once more when it is not.
    """
    shutil.rmtree(_old_journal(target), ignore_errors=True)


def _old_journal(target: Path) -> Path:
    return target.with_name(f".{target.name}.journal")
