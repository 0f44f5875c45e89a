"""`NAME.partial`, where a target is made, and the journal directory in it that says whose it is.

What lies beside each other says how far a conversion is; whoever finds it holds the lock before he changes anything:

| There is | State | What `lock_target` does |
|---|---|---|
| no `NAME.partial`, or an empty one, or a journal directory without an identity | new | makes what is missing |
| `NAME.partial/.journal/identity.json` | unfinished | goes on with it; else, with `--overwrite`, empties it |
| `NAME.partial/.journal/replaces`, `NAME.replaced`, no `NAME` | unfinished | gives the old target its name back first |
| `NAME/.journal/identity.json` | complete, and has its name | nothing: `commit.remove_leftovers` is left to do |
| anything else named `NAME.partial` | somebody else's | refuses, and touches nothing |

Only a directory with an identity is ever taken up or emptied, and never read as a checkpoint; nor is one that another
user owns or can write. It is its owner's alone until it is complete, and no link in it is followed.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dist_convert.errors import ResumeRefused, SourceError, TargetExists
from dist_convert.read.source import parse_json
from dist_convert.records import human_bytes, names
from dist_convert.write.files import (
    PARTIAL_SUFFIX,
    TEMPORARY,
    Place,
    holding,
    is_plain,
    opened,
    replace_files,
    sync,
    sync_parent,
    waiting_files,
    write_file,
    writing,
)
from dist_convert.write.journal import JOURNAL_DIRECTORY, journals
from dist_convert.write.lock import Lock, check_unlocked
from dist_convert.write.trees import found_below, make_parents, remove, rename_to_new

#: Of the digests in an identity and in a manifest: 2 since copies are the intersection of two catalogs.
FORMAT = 2
_SHOWN = 5


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What keeps a run from going on where an earlier one stopped, for people; empty where nothing does."""
    if old.get("format") != new["format"]:
        return f"{_other_version(old, new)}, which alone can go on with it"
    found = [*_source_differences(old["source"], new["source"])]
    if (old["plan"], old["settings"]) != (new["plan"], new["settings"]) and not found:
        found = [
            *_value_differences("--", old["flags"], new["flags"]),
            *_value_differences("argument ", old["settings"], new["settings"]),
        ]
    if (old["plan"], old["settings"], old.get("blocks")) != (new["plan"], new["settings"], new["blocks"]) and not found:
        found = [f"version {old['version']} of the converter, {new['version']} now, which plans otherwise"]
    return names(found, _SHOWN, "; ")


def differences_of_complete(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What keeps a complete target from being what a run would make, for people; both are facts of a manifest."""
    if old.get("format") != new["format"]:
        return f"complete, and {_other_version(old, new)}"
    # By their sizes, times and headers source files are the same, wherever they lie: a node may have its own path.
    old_files, new_files = (
        {file: tuple(known.values()) for file, known in facts["source"]["files"].items()} for facts in (old, new)
    )
    found = [*_source_differences(old_files, new_files), *_value_differences("--", old["flags"], new["flags"])]
    if not found and any(old[name] != new[name] for name in ("plan", "settings", "conversion")):
        found = ["its files are planned otherwise, or its arguments are others"]
    return names(found, _SHOWN, "; ")


def _other_version(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return f"made by another version (format {old.get('format', 1)}, {new['format']} now)"


def _source_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for file in sorted(old.keys() | new.keys()):
        if file not in new or file not in old:
            yield f"{file} is {'new' if file in new else 'gone'}"
            continue
        (old_bytes, old_ns, old_header), (new_bytes, new_ns, new_header) = old[file], new[file]
        if old_bytes != new_bytes:
            yield f"{file} had {human_bytes(old_bytes)} ({old_bytes} bytes), now {new_bytes}"
        elif old_ns != new_ns:
            yield f"{file} was last changed {_time(old_ns)}, now {_time(new_ns)}"
        elif old_header != new_header:
            yield f"{file} has another header"


def _value_differences(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            label = kind + (name.removesuffix("_bytes").replace("_", "-") if kind == "--" else name)
            yield f"{label} was {old.get(name)}, now {new.get(name)}"


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9).astimezone().isoformat(sep=" ", timespec="milliseconds")


#: In the partial directory while starting again may be all it takes: what a job script looks for before it does.
RESUMABLE = "resumable"
IDENTITY_FILE, _LOCK = "identity.json", "lock"
#: Notes: what the old target was that this conversion moves aside; and nothing counts of what has been written, here
#: and on the target's other disks, so that the next run has to `forget` it.
REPLACES, VOID = "replaces", "void"
ASIDE_SUFFIX = ".replaced"


def partial_of(target: Path) -> Path:
    """Where a target is made before it gets its name."""
    return target.with_name(target.name + PARTIAL_SUFFIX)


def aside_of(target: Path) -> Path:
    """Where a target that is replaced waits until its successor has its name."""
    return target.with_name(target.name + ASIDE_SUFFIX)


def files_below(directory: Path) -> set[str]:
    """The names of a target's files in the directory where it is made."""
    files = {name for name, found in found_below(directory).items() if stat.S_ISREG(found.st_mode)}
    return {name for name in files - {RESUMABLE} if not name.startswith(JOURNAL_DIRECTORY + "/")}


def is_ours(directory: Path) -> bool:
    """Whether a conversion made a directory and has not ended."""
    return has_note(directory, IDENTITY_FILE)


def has_note(directory: Path, note: str) -> bool:
    """Whether a run has left a note in a directory of ours."""
    try:
        with holding(directory, f"{JOURNAL_DIRECTORY}/{note}") as (holder, last):
            return is_plain(os.stat(last, dir_fd=holder, follow_symlinks=False))
    except OSError:
        return False


def read_note(directory: Path, note: str) -> str:
    """What a note says, "" where there is none."""
    try:
        with opened(directory, f"{JOURNAL_DIRECTORY}/{note}") as descriptor:
            return os.read(descriptor, 4096).decode(errors="replace")
    except OSError:
        return ""


def set_note(directory: Path, note: str, text: str = "") -> None:
    """Note something for later runs."""
    replace_files(directory, {f"{JOURNAL_DIRECTORY}/{note}": text.encode()})


def is_made_of(directory: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a conversion of this identity was begun in a directory, and has not ended, whatever its name is."""
    return is_ours(directory) and not _differences(directory, identity)


def _differences(directory: Path, identity: Mapping[str, Any]) -> str:
    try:
        return differences(_read_identity(directory), identity)
    except (OSError, SourceError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return "the record of what it is made from cannot be read"


#: Far more than any has: args of a few hundred names, and a digest for each file of the source.
_MOST_IDENTITY_BYTES = 16 << 20


def _read_identity(directory: Path) -> Mapping[str, Any]:
    with opened(directory, name := f"{JOURNAL_DIRECTORY}/{IDENTITY_FILE}") as descriptor:
        return parse_json(os.pread(descriptor, _MOST_IDENTITY_BYTES, 0), str(directory / name))


def check_partial(target: Path, identity: Mapping[str, Any], sizes: Mapping[str, int], *, overwrite: bool) -> None:
    """Check what earlier runs left of a target; makes nothing.

    Args:
        sizes: in bytes, of the weights files that are made in this directory.
        overwrite: whether what cannot be gone on with may be thrown away.

    Raises:
        TargetExists: something that no conversion left has the partial directory's name.
        ResumeRefused: an unfinished conversion that this one cannot go on with, without `overwrite`.
        TargetBusy: it is at work.
    """
    partial = partial_of(target)
    if not os.path.lexists(partial):
        return
    _refuse_others(partial)
    if _is_new(partial):
        return
    refuse_exchanged(partial)
    check_unlocked(partial / JOURNAL_DIRECTORY / _LOCK, str(partial))
    if not overwrite and (refused := _obstacle(partial, identity, sizes)):
        raise refused


def place_of(directory: Path) -> Place:
    """Which directory has a name; none that is there is (0, 0)."""
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def refuse_exchanged(partial: Path, place: Place | None = None) -> None:
    """Refuse what no conversion has begun in, as where a directory was exchanged for another one during the run.

    Args:
        place: of the directory that this conversion has held since it began.

    Raises:
        TargetExists
    """
    if not is_ours(partial) or place not in (None, place_of(partial)):
        raise TargetExists(
            "what lies where the target is made was not left by a conversion"
            if place is None
            else "what lies where the target is made is not what this conversion has begun in",
            file=str(partial),
            expected=f"nothing, or a directory with {JOURNAL_DIRECTORY}/{IDENTITY_FILE}" if place is None else "",
            found="" if os.path.lexists(partial) else "nothing any more",
            remedy="move it away, then start the same command again; or choose another target",
        )


def is_gone_on_with(partial: Path, identity: Mapping[str, Any], sizes: Mapping[str, int], *, overwrite: bool) -> bool:
    """Whether a conversion takes up what is there; one that may overwrite does not where the last one found no way."""
    has_way = not overwrite or (partial / RESUMABLE).exists()
    return is_ours(partial) and has_way and _obstacle(partial, identity, sizes) is None


def _refuse_others(partial: Path) -> None:
    """Refuse a partial directory that somebody else may have prepared, or may change while it is used."""
    found = partial.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no directory"
    elif found.st_uid == os.geteuid() and not found.st_mode & _OF_OTHERS:
        return
    else:
        # Some network file systems show all files as somebody else's, or as everybody's: so they show a new one.
        try:
            name = f"{JOURNAL_DIRECTORY}-{secrets.token_hex(8)}"
            with opened(partial, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                os.fchmod(descriptor, 0o600)
                usual = os.fstat(descriptor)
                (partial / name).unlink()
        except OSError:
            usual = None
        if usual and found.st_uid == usual.st_uid and not found.st_mode & _OF_OTHERS & ~usual.st_mode:
            return
        what = f"a directory of user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}"
    raise TargetExists(
        "what lies where the target is made may be somebody else's",
        file=str(partial),
        expected=f"a directory of user {os.geteuid()} that nobody else can write",
        found=what,
        remedy="choose another target; or move it away, or, if all in it is yours, take away the right of others to "
        "write it",
    )


#: The right of others to write.
_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def _is_new(partial: Path) -> bool:
    """Whether nothing is there but what `lock_target` makes before the identity."""
    names = set(os.listdir(partial))
    journal = partial / JOURNAL_DIRECTORY
    if JOURNAL_DIRECTORY in names:
        if journal.is_symlink() or not journal.is_dir():
            return False
        if not all(name == _LOCK or TEMPORARY.fullmatch(name) for name in os.listdir(journal)):
            return False
    return names <= {JOURNAL_DIRECTORY, RESUMABLE}


def _obstacle(partial: Path, identity: Mapping[str, Any], sizes: Mapping[str, int]) -> ResumeRefused | None:
    """Why a conversion cannot go on with what is there, if it cannot."""
    if different := _differences(partial, identity):
        return ResumeRefused(
            "an unfinished conversion of something else is where the target is made",
            file=str(partial),
            found=different,
            remedy="to go on with it, start it as it was begun; or start anew with --overwrite",
        )
    for name, found in found_below(partial).items():
        path = partial / name
        if stat.S_ISDIR(found.st_mode):
            if name in sizes or path.parent.name == JOURNAL_DIRECTORY:
                return damaged(path, "a directory in a file's place")
        elif not is_plain(found):
            return damaged(path, "a link, a pipe or a file with a second name")
        elif found.st_size > sizes.get(name, found.st_size):
            return damaged(path, f"{found.st_size} bytes, of which it can have {sizes[name]}")
    return None


def damaged(path: Path, found: str) -> ResumeRefused:
    """The error about something in a partial directory that no conversion leaves there."""
    return ResumeRefused(
        "an unfinished conversion was changed or damaged, and cannot be gone on with",
        file=str(path),
        found=found,
        remedy="start anew with --overwrite, or choose another target",
    )


def lock_target(target: Path, identity: Mapping[str, Any], sizes: Mapping[str, int], *, overwrite: bool) -> Lock:
    """Make the partial directory, or take up one that passes `check_partial`; nobody else has it until the release."""
    partial = partial_of(target)
    if is_made_of(target, identity):  # only the last steps are missing
        return Lock(target / JOURNAL_DIRECTORY / _LOCK, str(target), place=place_of(target))
    with writing(partial):
        make_parents(partial)
        with contextlib.suppress(FileExistsError):
            partial.mkdir(mode=0o700)
        place = place_of(partial)  # before it is checked: from here on, nothing else is taken for it
        check_partial(target, identity, sizes, overwrite=overwrite)
        lock = Lock(partial / JOURNAL_DIRECTORY / _LOCK, str(partial), place=place)
        try:
            if not _is_new(partial):
                refuse_exchanged(partial)
            _restore_aside(target)
            if not overwrite and is_ours(partial) and (refused := _obstacle(partial, identity, sizes)):
                raise refused
            if not is_gone_on_with(partial, identity, sizes, overwrite=overwrite):
                _start_anew(partial, identity, place)
            elif not (partial / RESUMABLE).exists():
                _mark_resumable(partial)
        except BaseException:
            lock.release()
            raise
        return lock


def _mark_resumable(partial: Path) -> None:
    write_file(partial, RESUMABLE, b"unfinished: start the same command again to go on\n")


def _start_anew(partial: Path, identity: Mapping[str, Any], place: Place) -> None:
    """Begin in a directory that is new, or empty one of ours: its journals first, which speak of all else in it."""
    kept = {JOURNAL_DIRECTORY, *(f"{JOURNAL_DIRECTORY}/{name}" for name in (IDENTITY_FILE, _LOCK, VOID))}
    forget(partial, place)
    for name in found_below(partial, place=place).keys() - kept:
        if name.removeprefix(f"{JOURNAL_DIRECTORY}/").count("/") == 0:
            remove(partial, name, place)
    remove(partial, f"{JOURNAL_DIRECTORY}/{VOID}", place)
    _mark_resumable(partial)
    set_note(partial, IDENTITY_FILE, json.dumps(identity, indent=1))
    sync(partial)
    sync_parent(partial)


def forget(partial: Path, place: Place | None) -> None:
    """Remove the journals, so that nothing counts of what has been written."""
    for name in journals(partial):
        remove(partial, f"{JOURNAL_DIRECTORY}/{name}", place)
    sync(partial / JOURNAL_DIRECTORY)


def _restore_aside(target: Path) -> None:
    """Give a target its name back that was moved aside by a run that ended before its successor had the name."""
    if not os.path.lexists(target) and is_moved_aside(target, partial_of(target)):
        rename_to_new(aside_of(target), target)
        sync_parent(target)


def look(target: Path) -> str:
    """What a target is at this moment: its inode, and a digest of what lies in it; "" where there is nothing."""
    if not os.path.lexists(target):
        return ""
    found = found_below(target.resolve()) if target.is_dir() else {}
    lines = [
        [name, one.st_mode, *([one.st_size, one.st_mtime_ns] if is_plain(one) else [])] for name, one in found.items()
    ]
    return f"{target.lstat().st_ino} {hashlib.sha256(json.dumps(lines).encode()).hexdigest()}"


def is_moved_aside(target: Path, directory: Path) -> bool:
    """Whether what waits aside is what the conversion that makes a directory has moved there, and nothing else."""
    return read_note(directory, REPLACES) == (look(aside_of(target)) or None)


def used_bytes(partial: Path) -> int:
    """What a directory of ours has on its disk already, and is free for its successor."""
    if not is_ours(partial):
        return 0
    return sum(found.st_blocks * 512 for found in found_below(partial).values())


def refuse_unfinished(path: Path, name: str | None = None) -> None:
    """Refuse to read what a conversion is making, or has left unfinished, under its own name or another.

    Args:
        path: a Hugging Face directory, or a Megatron checkpoint's root or iteration.
        name: of the iteration in it.

    Raises:
        SourceError: naming the conversion's source, and how to go on with it.
    """
    if any(made and os.path.lexists(path / made) for made in waiting_files(path).values()):
        raise SourceError(
            "files of the model wait to replace those of before",
            file=str(path),
            remedy="start the dist-convert tokenizer that was stopped again: it goes on where it stopped",
        )
    for place in _places(path, name):
        if is_ours(place) and (place.name.endswith(PARTIAL_SUFFIX) or (place / RESUMABLE).exists()):
            found = "what a conversion has made so far"
            with contextlib.suppress(OSError, SourceError, LookupError, TypeError):
                if place.stat().st_uid == os.geteuid():
                    found = f"what a conversion of {_read_identity(place)['flags']['source']} has made so far"
            raise SourceError(
                "an unfinished conversion, which is no checkpoint yet",
                file=str(place),
                found=found,
                remedy="wait for that conversion if it is at work, else start its command again: it goes on where it "
                "stopped",
            )


def _places(path: Path, name: str | None) -> Iterator[Path]:
    for place in (path, *([path / name] if name else [])):
        yield place if os.path.lexists(place) else partial_of(place)
    if name is None and path.is_dir():
        below = sorted(place for place in path.iterdir() if place.is_dir())
        if all(place.name.endswith(PARTIAL_SUFFIX) for place in below):
            yield from below
