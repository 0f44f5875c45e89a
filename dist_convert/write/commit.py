"""The target directory: whether it can be made, and how it gets its name when it is complete."""

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from dist_convert.errors import NotEnoughSpace, SourceError, TargetError, TargetExists, UsageError
from dist_convert.read.source import read_small_file
from dist_convert.records import JsonObject, counted, human_bytes, names
from dist_convert.write.files import Beside, Directory, holding, replace_files, sync, writing
from dist_convert.write.journal import JOURNAL_DIRECTORY
from dist_convert.write.manifest import MANIFEST_FILE, unknown_files
from dist_convert.write.partial import (
    IDENTITY_FILE,
    REPLACES,
    RESUMABLE,
    aside_of,
    exchanged,
    files_below,
    has_note,
    is_moved_aside,
    is_ours,
    look,
    partial_of,
    read_note,
    remove_journal,
    set_note,
    used_bytes,
)
from dist_convert.write.trees import existing_parent, found_below, lies_in, mount_points, remove, rename_to_new


def check_target(
    target: Path,
    source: Path,
    manifest: JsonObject,
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
            what = "the target is a mount point, and no directory can be renamed to one"
            expected = "a new or empty directory on the file system of the directory that holds it"
            remedy = f"choose a target inside of it, such as {target / 'model'}"
            raise TargetError(what, place, expected, found="a mount point", remedy=remedy)
        if mounted and (overwrite or place != target):
            what = "a file system is mounted inside a directory that would be replaced or removed"
            remedy = f"unmount it, then start the same command again; or {another}"
            raise TargetError(what, place / mounted[0], remedy=remedy)
    there = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if os.path.lexists(target) and not there and (target.is_symlink() or not target.is_dir()):
        raise TargetExists("the target is a file or a link", file, remedy=another)
    if there and not overwrite:
        is_ours = bool(manifest) and not _lies_around(target, source)
        many = counted(len(there), "file or directory", "files and directories")
        raise TargetExists(
            "the target directory is not empty",
            file,
            expected="a new or empty directory",
            found=f"a conversion: {different}" if different else many,
            remedy=f"{another}, or replace it with --overwrite" if is_ours else another,
        )
    if there and not manifest:
        raise TargetExists(
            "the target directory was not made by a conversion, so it is not replaced",
            file,
            expected=f"{MANIFEST_FILE}, which an earlier conversion leaves",
            found=f"another {MANIFEST_FILE}" if MANIFEST_FILE in there else ", ".join(there[:6]),
            remedy=another,
        )
    for used in (target, partial_of(target), aside_of(target)):
        if lies_in(source, used):
            remedy = f"{another}: a conversion also writes to its name with .partial and with .replaced"
            raise UsageError("the source lies where the target is made", used, found=source, remedy=remedy)
    if lies_in(target, source):
        expected = f"a directory outside of {source}"
        raise UsageError("the target lies in its own source", file, expected, remedy=another)
    if there and (others := unknown_files(target, manifest)):
        what = "the target holds files that no conversion has made, so it is not replaced"
        raise TargetExists(what, file, found=names(others), remedy=f"move them away, or {another}")
    if there and not _is_removable(target):
        what = "this user cannot replace the target"
        expected = f"directories that user {os.geteuid()} can rename and empty"
        found = f"some belong to user {target.stat().st_uid}"
        raise TargetError(what, file, expected, found, remedy=f"have that user replace it, or {another}")
    if os.path.lexists(aside_of(target)) and (there or not is_moved_aside(target, partial_of(target))):
        what = "an interrupted --overwrite has left the old target aside"
        raise TargetExists(what, aside_of(target), remedy="rename it; it may be the only copy of a model")
    parent = existing_parent(target)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        found = f"{parent} is not a directory, or is write-protected"
        raise TargetError("the target cannot be made here", file, found=found, remedy=f"{another}, or make it writable")
    space = os.statvfs(parent)
    free_bytes = space.f_bavail * space.f_frsize + used_bytes(partial_of(target))
    if free_bytes < needed_bytes:
        what, expected = "not enough free space for the target", f"{human_bytes(needed_bytes)} ({needed_bytes:,} bytes)"
        found = f"{human_bytes(free_bytes)} free ({free_bytes:,} bytes)"
        raise NotEnoughSpace(what, file, expected, found, remedy=f"free space, or {another}")
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
    return lies_in(target, source) or any(lies_in(one, target) for one in (source, Path.cwd()))


def commit(directory: Directory, parent: Directory, target: Path, *, replaces: str) -> None:
    """Give the partial directory its final name; a target that is replaced moves aside first.

    The journal stays inside until `remove_leftovers`: by it a run that finds the target knows what is left to do.

    Args:
        directory, parent: the partial directory, and the one that holds it and the target.
        target: its final path.
        replaces: what `look` said at the start of a target that may be replaced; "" where there was none.

    Raises:
        TargetExists: the target or the partial directory is another than at the start; both are kept.
        TargetError, NotEnoughSpace: the file system refuses; a target that was moved aside has its name back.
    """
    aside, partial, at = aside_of(target), directory.path, parent.descriptor
    if not directory.is_named(partial.name, parent):
        raise exchanged(partial)
    with writing(target):
        files = files_below(directory)
        for name in (*files, *{name.rpartition("/")[0] or "." for name in files}):
            sync(directory, name)
        remove(directory, RESUMABLE)
        sync(directory)
        moves = target.is_symlink() or (target.exists() and any(target.iterdir()))
        if moves:
            _check_same(target, target, replaces)
            set_note(directory, REPLACES, replaces)
            rename_to_new(at, target.name, at, aside.name)
        try:
            if moves:
                _check_same(target, aside, replaces)
            if directory.is_named(partial.name, parent):
                os.rename(partial.name, target.name, src_dir_fd=at, dst_dir_fd=at)
                if not directory.is_named(target.name, parent):
                    rename_to_new(at, target.name, at, partial.name)
            if not directory.is_named(target.name, parent):
                raise exchanged(partial)
        except BaseException:
            if moves:
                rename_to_new(at, aside.name, at, target.name)
            raise
        sync(parent)


def _check_same(target: Path, place: Path, replaces: str) -> None:
    """Check that what is to be replaced, wherever it is by now, is still what it was at the start."""
    if look(place) != replaces:
        what = "the target was changed during the conversion, so it is not replaced"
        expected = "what was there when the conversion began" if replaces else "nothing, as when it began"
        remedy = f"move it away, then start the same command again: {partial_of(target)} is complete"
        raise TargetExists(what, target, expected, remedy=remedy)


_MOST_BESIDE_BYTES = 16 << 20


def check_beside(target: Path, files: Mapping[str, Beside]) -> None:
    """Check that files beside a target can be replaced; a TargetExists where one of them is somebody else's."""
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
        what = "a file of the target exists already and was not made by a conversion, so it is not replaced"
        expected = "nothing, or what Megatron or a conversion leaves there"
        remedy = "move it away, then start the same command again; or choose another target"
        raise TargetExists(what, path, expected, found, remedy)


def publish(target: Directory, parent: Directory, files: Mapping[str, Beside]) -> None:
    """Replace files in the directory that holds a target, which has its name.

    They are written in the target's journal first: whatever a killed run leaves of them is removed with it. Of a target
    that an earlier run has completed only those that are gone are written: what is there may have moved on.

    Raises:
        TargetExists: see `check_beside`; all stay.
    """
    check_beside(target.path, files)
    is_new = is_ours(target)
    contents = {name: file.content for name, file in files.items() if is_new or not os.path.lexists(parent / name)}
    replace_files(parent, contents, (target, JOURNAL_DIRECTORY) if is_new else None)


def remove_leftovers(target: Directory, parent: Directory, files: Mapping[str, Beside]) -> str:
    """The last step of a conversion: remove what it replaced, and its journal, as far as nobody holds it.

    Args:
        target, parent: what has its name, and what holds it.
        files: see `publish`.

    Returns:
        What is left for the user to remove, in a sentence.

    Raises:
        TargetExists: before or after that, something else has the name of the target or of a file beside it.
    """
    kept = ""
    if is_new := is_ours(target):
        _check_named(target)
        with writing(target.path), holding(target, f"{JOURNAL_DIRECTORY}/{IDENTITY_FILE}") as (holder, identity):
            if has_note(target, REPLACES) and not _remove_aside(target, parent):
                kept = f"warning: {aside_of(target.path)} was changed since it was moved aside, and is kept"
            for name in set(os.listdir(holder)) - {identity}:
                remove(target, f"{JOURNAL_DIRECTORY}/{name}")
            # Until here the directory was its owner's alone; now others have of it what they have of its files.
            usual = os.stat(identity, dir_fd=holder).st_mode & 0o666
            special = os.fstat(target.descriptor).st_mode & 0o7000
            with contextlib.suppress(PermissionError):  # of file systems without modes
                os.chmod(target.descriptor, special | 0o700 | usual | (usual & 0o444) >> 2)
            os.unlink(identity, dir_fd=holder)
    remove_journal(target)
    if is_new:
        _check_named(target)
    check_beside(target.path, files)
    return kept


def _remove_aside(target: Directory, parent: Directory) -> bool:
    """Remove the old target that waits aside, in the journal, so that it may go whatever is left of it by a kill.

    What is not the directory that the note names comes out again; returns whether nothing of it is left.
    """
    inode, aside = read_note(target, REPLACES).partition(" ")[0], aside_of(target.path)
    with holding(target, f"{JOURNAL_DIRECTORY}/{aside.name}") as (holder, name):
        if is_moved_aside(target.path, target):
            os.rename(name, name, src_dir_fd=parent.descriptor, dst_dir_fd=holder)
        if name in os.listdir(holder) and str(os.stat(name, dir_fd=holder, follow_symlinks=False).st_ino) != inode:
            rename_to_new(holder, name, parent.descriptor, name)
    remove(target, f"{JOURNAL_DIRECTORY}/{name}")
    return not os.path.lexists(aside)


def _check_named(target: Directory) -> None:
    """Check that the target's path leads to it, whatever is on the way there by now."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(target.path), os.fstat(target.descriptor)):
            return
    what = "something else has taken the name of the finished target"
    found = "a link" if target.path.is_symlink() else "" if os.path.lexists(target.path) else "nothing"
    remedy = "find where the target was moved to, and move it back: it is complete"
    raise TargetExists(what, target, found=found, remedy=remedy)
