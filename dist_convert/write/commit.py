"""The target directory: whether it can be made, and how it gets its name when it is complete."""

import contextlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_convert.errors import NotEnoughSpace, SourceError, TargetError, TargetExists, UsageError
from dist_convert.read.source import read_small_file
from dist_convert.records import counted, human_bytes, names
from dist_convert.write.files import Beside, Place, holding, replace_files, sync, sync_parent, writing
from dist_convert.write.journal import JOURNAL_DIRECTORY, Journal
from dist_convert.write.manifest import MANIFEST_FILE, unknown_files
from dist_convert.write.partial import (
    IDENTITY_FILE,
    REPLACES,
    RESUMABLE,
    aside_of,
    files_below,
    has_note,
    is_moved_aside,
    is_ours,
    look,
    partial_of,
    place_of,
    refuse_exchanged,
    set_note,
    used_bytes,
)
from dist_convert.write.trees import existing_parent, found_below, mount_points, remove, rename_to_new


def check_target(
    target: Path,
    source: Path,
    manifest: Mapping[str, Any],
    *,
    overwrite: bool,
    needed_bytes: int,
    different: str | None = None,
) -> int:
    """Check that the target can be made, and return the free bytes of its file system.

    Args:
        source: the checkpoint, which must not lie inside the target, nor the target inside it.
        manifest: of what is there, see `manifest_of`.
        overwrite: whether an existing target may be replaced, if a conversion has made it.
        needed_bytes: of all files together; an existing target's space is not free before the end.
        different: in what a complete conversion that is there is another one, for messages.

    Raises:
        TargetExists, TargetError, NotEnoughSpace
        UsageError: source and target lie in one another.
    """
    file, another = str(target), "choose another target"
    for place in (target, partial_of(target)):
        mounted = mount_points(place) if place.is_dir() and not place.is_symlink() else []
        if "" in mounted:
            raise TargetError(
                "the target is a mount point, and is to get its name by renaming, which is not possible there",
                file=str(place),
                expected="a new or empty directory on the file system of the directory that holds it",
                found="a mount point",
                remedy=f"choose a target inside of it, such as {target / 'model'}",
            )
        if mounted and (overwrite or place != target):
            raise TargetError(
                "a file system is mounted inside of what is to be replaced or removed",
                file=str(place / mounted[0]),
                remedy=f"unmount it, then start the same command again; or {another}",
            )
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if os.path.lexists(target) and not there and (target.is_symlink() or not target.is_dir()):
        raise TargetExists("the target is a file or a link", file=file, remedy=another)
    if there and not overwrite:
        is_ours = bool(manifest) and not _lies_around(target, source)
        raise TargetExists(
            "the target directory is not empty",
            file=file,
            expected="a new or empty directory",
            found=f"a conversion: {different}"
            if different
            else counted(len(there), "file or directory", "files and directories"),
            remedy=f"{another}, or replace it with --overwrite" if is_ours else another,
        )
    if there and not manifest:
        raise TargetExists(
            "no conversion has made the target directory, so it is not replaced",
            file=file,
            expected=f"{MANIFEST_FILE}, which an earlier conversion leaves",
            found=f"another {MANIFEST_FILE}" if MANIFEST_FILE in there else ", ".join(there[:6]),
            remedy=another,
        )
    for used in (target, partial_of(target), aside_of(target)):
        if source.resolve().is_relative_to(used.resolve()):
            remedy = f"{another}; its name, and its name with .partial and .replaced, are written to"
            what = "the source lies where the target is made"
            raise UsageError(what, file=str(used), found=str(source), remedy=remedy)
    if target.resolve().is_relative_to(source.resolve()):
        expected = f"a directory outside of {source}"
        raise UsageError("the target lies in its own source", file=file, expected=expected, remedy=another)
    if there and (others := unknown_files(target, manifest)):
        raise TargetExists(
            "the target holds files that no conversion has made, so it is not replaced",
            file=file,
            found=names(others),
            remedy=f"move them away, or {another}",
        )
    if there and not _is_removable(target):
        raise TargetError(
            "the target is not this user's to replace",
            file=file,
            expected=f"directories that user {os.geteuid()} can rename and empty",
            found=f"some of user {target.stat().st_uid}",
            remedy=f"have that user replace it, or {another}",
        )
    if os.path.lexists(aside_of(target)) and (there or not is_moved_aside(target, partial_of(target))):
        raise TargetExists(
            "what an interrupted replacement moved aside is still there",
            file=str(aside_of(target)),
            remedy="give it another name; it may be the only copy of a model",
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
            expected=f"{human_bytes(needed_bytes)} ({needed_bytes:,} bytes)",
            found=f"{human_bytes(free_bytes)} free ({free_bytes:,} bytes)",
            remedy=f"free space, or {another}",
        )
    return free_bytes


def _is_removable(target: Path) -> bool:
    """Whether this user may rename a directory, and remove what lies in it."""
    parent = target.absolute().parent.stat()
    is_kept = bool(parent.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, parent.st_uid, target.lstat().st_uid)
    below = found_below(target.resolve())
    directories = (target / name for name, found in below.items() if stat.S_ISDIR(found.st_mode))
    return not is_kept and all(os.access(path, os.W_OK | os.X_OK) for path in (target, *directories))


def _lies_around(target: Path, source: Path) -> bool:
    """Whether a target holds the source or the current directory, or lies in the source."""
    place, origin = target.resolve(), source.resolve()
    return place.is_relative_to(origin) or any(one.is_relative_to(place) for one in (origin, Path.cwd()))


def sync_files(directory: Path, names: Sequence[str], journal: Journal) -> None:
    """Force what this machine wrote of the named files to the disk."""
    for name in names:
        with journal.syncing(name):
            sync(directory / name)


def commit(partial: Path, target: Path, *, replaces: str, place: Place | None) -> None:
    """Give the partial directory its final name; a target that is replaced moves aside first.

    The journal stays inside until `remove_leftovers`: by it a run that finds the target knows what is left to do.

    Args:
        partial, target: the directory, and its final path.
        replaces: what `look` said at the start of a target that may be replaced; "" where there was none.
        place: see `Held`.

    Raises:
        TargetExists: the target or the partial directory is another than at the start; both are kept.
        TargetError, NotEnoughSpace: the file system refuses; a target that was moved aside has its name back.
    """
    aside = aside_of(target)
    refuse_exchanged(partial, place)
    with writing(target):
        files = [partial / name for name in files_below(partial)]
        for path in (*files, *{path.parent for path in files}):
            sync(path)
        remove(partial, RESUMABLE, place)
        sync(partial)
        moves = target.is_symlink() or (target.exists() and any(target.iterdir()))
        if moves:
            _check_same(target, target, replaces)
            set_note(partial, REPLACES, replaces)
            rename_to_new(target, aside)
        try:
            if moves:
                _check_same(target, aside, replaces)
            refuse_exchanged(partial, place)
            partial.rename(target)
        except BaseException:
            if moves:
                rename_to_new(aside, target)
            raise
        sync_parent(target)


def _check_same(target: Path, place: Path, replaces: str) -> None:
    """Check that what is to be replaced, wherever it is by now, is still what it was at the start."""
    if look(place) != replaces:
        raise TargetExists(
            "the target was changed during the conversion, so it is not replaced",
            file=str(target),
            expected="what was there when the conversion began" if replaces else "nothing, as when it began",
            remedy=f"move it away, then start the same command again: {partial_of(target)} is complete",
        )


_MOST_BESIDE_BYTES = 16 << 20


def check_beside(target: Path, files: Mapping[str, Beside]) -> None:
    """Check that files in the directory that holds a target can be replaced, by name.

    Raises:
        TargetExists: something of somebody else's has such a name.
    """
    for name, file in files.items():
        path, found = target.absolute().parent / name, "a link"
        if not os.path.lexists(path):
            continue
        if not path.is_symlink():
            try:
                content = read_small_file(path, _MOST_BESIDE_BYTES)
            except SourceError as error:
                found = error.found
            else:
                if re.fullmatch(file.replaces, content, re.DOTALL):
                    continue
                found = "something else"
        raise TargetExists(
            "what no conversion has made has the name of a file that is to be written, and is not replaced",
            file=str(path),
            expected="nothing, or what Megatron or a conversion leaves there",
            found=found,
            remedy="move it away, then start the same command again; or choose another target",
        )


def publish(target: Path, files: Mapping[str, Beside]) -> None:
    """Replace files in the directory that holds a target, which has its name.

    They are written in the target's journal first: whatever a killed run leaves of them is removed with it. Of a target
    that an earlier run has completed only those that are gone are written: what is there may have moved on.

    Raises:
        TargetExists: see `check_beside`; all stay.
    """
    check_beside(target, files)
    root, is_new = target.absolute().parent, is_ours(target)
    contents = {name: file.content for name, file in files.items() if is_new or not os.path.lexists(root / name)}
    replace_files(root.resolve(), contents, (target, JOURNAL_DIRECTORY) if is_new else None)


def remove_leftovers(target: Path, place: Place | None, files: Mapping[str, Beside]) -> str:
    """The last step of a conversion: remove what it replaced, and its journal, as far as nobody holds it.

    Args:
        place: see `Held`.
        files: see `publish`.

    Returns:
        What is left for the user to remove, in a sentence.

    Raises:
        TargetExists: before or after that, something else has the name of the target or of a file beside it.
    """
    aside, kept = aside_of(target), ""
    _check_named(target, place)
    with writing(target):
        if has_note(target, REPLACES) and os.path.lexists(aside):
            if is_moved_aside(target, target):
                with holding(target, f"{JOURNAL_DIRECTORY}/{aside.name}", place=place) as (holder, name):
                    os.rename(aside, name, dst_dir_fd=holder)  # so that it may go, whatever is left of it
            else:
                kept = f"warning: {aside} was changed since it was moved aside, and is kept"
        if is_ours(target):
            with holding(target, f"{JOURNAL_DIRECTORY}/{IDENTITY_FILE}", place=place) as (holder, identity):
                for name in set(os.listdir(holder)) - {identity}:
                    remove(target, f"{JOURNAL_DIRECTORY}/{name}", place)
                # Until here the directory was its owner's alone; now others have of it what they have of its files.
                usual = os.stat(identity, dir_fd=holder).st_mode & 0o666
                special = os.stat("..", dir_fd=holder).st_mode & 0o7000
                with contextlib.suppress(PermissionError):  # of file systems without modes
                    os.chmod("..", special | 0o700 | usual | (usual & 0o444) >> 2, dir_fd=holder)
                os.unlink(identity, dir_fd=holder)
    remove_journal(target)
    _check_named(target, place)
    check_beside(target, files)
    return kept


def _check_named(target: Path, place: Place | None) -> None:
    if place not in (None, place_of(target)):
        raise TargetExists(
            "something else has the name that this conversion has given to what it made",
            file=str(target),
            found="a link" if target.is_symlink() else "" if os.path.lexists(target) else "nothing any more",
            remedy="look where the target was moved to, and give it its name back: it is complete",
        )


def remove_journal(target: Path) -> None:
    """Remove the journal's directory, where nothing is left in it.

    Network file systems keep a file that is removed while it is open, as the lock is: call it once more when it is not.
    """
    with contextlib.suppress(OSError), holding(target, JOURNAL_DIRECTORY) as (holder, name):
        os.rmdir(name, dir_fd=holder)
