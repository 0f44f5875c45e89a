"""The target directory: made under `NAME.partial`, renamed to its name when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from dist_convert.errors import NotEnoughSpace, TargetError, TargetExists
from dist_convert.records import TargetFile
from dist_convert.write.file_writer import target_error


def check_target(target: Path, source: Path, *, overwrite: bool, needed_bytes: int) -> int:
    """Check that the target can be made, and return the free bytes of its file system.

    Args:
        target: final path.
        source: the checkpoint, which must not lie inside the target.
        overwrite: whether an existing target may be replaced.
        needed_bytes: of all files together; an existing target's space is not free before the end.

    Raises:
        TargetExists, TargetError, NotEnoughSpace
    """
    if target.exists() and not target.is_dir():
        raise TargetExists("the target is a file", file=str(target), remedy="choose another --save-path")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise TargetExists(
            "the target directory is not empty",
            file=str(target),
            expected="a new or empty directory",
            found=f"{sum(1 for _ in target.iterdir())} entries",
            remedy="choose another --save-path, or replace it with --overwrite",
        )
    if overwrite and target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise TargetExists(
            "the target directory does not look like a model, so it is not replaced",
            file=str(target),
            expected="a directory with a config.json",
            found=", ".join(sorted(path.name for path in target.iterdir())[:6]),
            remedy="choose another --save-path, or remove the directory yourself",
        )
    if source.resolve().is_relative_to(target.resolve()):
        raise TargetError(
            "the checkpoint lies inside the target",
            file=str(target),
            found=str(source),
            remedy="choose a --save-path that does not hold the checkpoint",
        )
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise TargetError(
            "the target cannot be made here", file=str(target), found=f"no permission to write in {parent}"
        )
    space = os.statvfs(parent)
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < needed_bytes:
        raise NotEnoughSpace(
            "not enough free space for the target",
            file=str(target),
            expected=f"{needed_bytes} bytes",
            found=f"{free_bytes} bytes free",
            remedy="free space, or choose another --save-path",
        )
    return free_bytes


def prepare(partial: Path, files: Sequence[TargetFile]) -> None:
    """Make the partial directory with every weights file: its header, then zeros to its final size.

    A partial directory that an earlier run left behind is replaced.
    """
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        for file in files:
            with (partial / file.name).open("wb") as output:
                output.write(file.header)
                output.truncate(file.size_bytes)
    except OSError as error:
        raise target_error(error, str(partial)) from error


def sync_files(directory: Path, names: Sequence[str]) -> None:
    """Force what this machine wrote of the named files to the disk."""
    for name in names:
        _sync(directory / name)


def commit(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Give the partial directory its final name; a target that is replaced moves aside first and goes last.

    Raises:
        TargetExists: a target appeared while the conversion ran, and `overwrite` is false.
    """
    aside = target.with_name(target.name + ".replaced")
    try:
        sync_files(partial, [path.name for path in partial.iterdir()])
        _sync(partial)
        if target.exists() and any(target.iterdir()):
            if not overwrite:
                raise TargetExists("the target appeared during the conversion", file=str(target))
            if aside.exists():
                shutil.rmtree(aside)
            target.rename(aside)
        partial.rename(target)
        _sync(target.absolute().parent)
        if aside.exists():
            shutil.rmtree(aside)
    except OSError as error:
        raise target_error(error, str(target)) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
