"""The target directory: made under `NAME.partial`, renamed to its name when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_convert.errors import NotEnoughSpace, TargetError, TargetExists
from dist_convert.write.file_writer import target_error

#: Of the directory in which a target is made before it gets its name.
PARTIAL_SUFFIX = ".partial"


def partial_of(target: Path) -> Path:
    """Where a target is made before it gets its name."""
    return target.with_name(target.name + PARTIAL_SUFFIX)


def _aside_of(target: Path) -> Path:
    """Where a target that is replaced waits until its successor is complete."""
    return target.with_name(target.name + ".replaced")


def check_target(
    target: Path,
    source: Path,
    *,
    is_replaceable: Callable[[Path], bool],
    overwrite: bool,
    needed_bytes: int,
    flag: str = "--save-path",
) -> int:
    """Check that the target can be made, and return the free bytes of its file system.

    Args:
        target: final path.
        source: the checkpoint, which must not lie inside the target.
        is_replaceable: whether a directory looks like what an earlier conversion wrote.
        overwrite: whether an existing target may be replaced.
        needed_bytes: of all files together; an existing target's space is not free before the end.
        flag: that named the target, for messages.

    Raises:
        TargetExists, TargetError, NotEnoughSpace
    """
    if target.exists() and not target.is_dir():
        raise TargetExists("the target is a file", file=str(target), remedy=f"choose another {flag}")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise TargetExists(
            "the target directory is not empty",
            file=str(target),
            expected="a new or empty directory",
            found=f"{sum(1 for _ in target.iterdir())} entries",
            remedy=f"choose another {flag}, or replace it with --overwrite",
        )
    if overwrite and target.is_dir() and any(target.iterdir()) and not is_replaceable(target):
        raise TargetExists(
            "the target directory does not look like a converted model, so it is not replaced",
            file=str(target),
            expected="what an earlier conversion wrote",
            found=", ".join(sorted(path.name for path in target.iterdir())[:6]),
            remedy=f"choose another {flag}, or remove the directory yourself",
        )
    for used in (target, partial_of(target), _aside_of(target)):
        if source.resolve().is_relative_to(used.resolve()):
            raise TargetError(
                "the source lies where the target is made",
                file=str(used),
                found=str(source),
                remedy=f"choose another {flag}; its name, and its name with .partial and .replaced, are written to",
            )
    if _aside_of(target).exists():
        raise TargetExists(
            "what an interrupted replacement moved aside is still there",
            file=str(_aside_of(target)),
            remedy="rename or remove it; it may be the only copy of a model",
        )
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError(
            "the target cannot be made here",
            file=str(target),
            found=f"{parent} is no directory or is write-protected",
        )
    space = os.statvfs(parent)
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < needed_bytes:
        raise NotEnoughSpace(
            "not enough free space for the target",
            file=str(target),
            expected=f"{needed_bytes} bytes",
            found=f"{free_bytes} bytes free",
            remedy=f"free space, or choose another {flag}",
        )
    return free_bytes


def new_partial(partial: Path) -> None:
    """Make an empty partial directory; one that an earlier run left behind is replaced."""
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise target_error(error, str(partial)) from error


def sync_files(directory: Path, names: Sequence[str]) -> None:
    """Force what this machine wrote of the named files to the disk.

    Raises:
        TargetError, NotEnoughSpace: the file system refuses.
    """
    for name in names:
        try:
            sync_path(directory / name)
        except OSError as error:
            raise target_error(error, name) from error


def commit(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Give the partial directory its final name; a target that is replaced moves aside first and goes last.

    Raises:
        TargetExists: a target appeared while the conversion ran, and `overwrite` is false.
    """
    aside = _aside_of(target)
    replaced = False
    try:
        files = [path for path in partial.rglob("*") if path.is_file()]
        for path in (*files, *{path.parent for path in files}, partial):
            sync_path(path)
        if target.exists() and any(target.iterdir()):
            if not overwrite:
                raise TargetExists("the target appeared during the conversion", file=str(target))
            target.rename(aside)
            replaced = True
        partial.rename(target)
        sync_path(target.absolute().parent)
        if replaced:
            aside.unlink() if aside.is_symlink() else shutil.rmtree(aside)
    except OSError as error:
        raise target_error(error, str(target)) from error


def sync_path(path: Path) -> None:
    """Force a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
