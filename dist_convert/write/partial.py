"""`NAME.partial`, where a target is made, and the journal directory in it that says whose it is.

What lies beside each other says how far a conversion is; whoever finds it holds the lock before he changes anything:

| There is | State | What `locked_target` does |
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

from dist_convert.errors import ResumeRefused, SourceError, TargetExists
from dist_convert.read.source import parse_json
from dist_convert.records import JsonObject, human_bytes, names
from dist_convert.write import files as fs
from dist_convert.write.journal import JOURNAL_DIRECTORY, journals
from dist_convert.write.lock import Lock, check_unlocked
from dist_convert.write.trees import found_below, remove, rename_to_new

#: Of the digests in an identity and in a manifest: 2 since copies are the intersection of two catalogs.
FORMAT = 2
_SHOWN = 5


def differences(old: JsonObject, new: JsonObject) -> str:
    """What keeps a run from going on where an earlier one stopped, for people; empty where nothing does."""
    if old.get("format") != new["format"]:
        return f"{_other_version(old, new)}; only that version can resume it"
    found = _source_differences(old["flags"]["source"], old["source"], new["flags"]["source"], new["source"])
    if (old["plan"], old["settings"]) != (new["plan"], new["settings"]) and not found:
        found = [
            *_value_differences("--", old["flags"], new["flags"]),
            *_value_differences("argument ", old["settings"], new["settings"]),
        ]
    if (old["plan"], old["settings"], old.get("blocks")) != (new["plan"], new["settings"], new["blocks"]) and not found:
        found = [f"version {old['version']} of the converter, {new['version']} now, which plans differently"]
    return names(found, _SHOWN, "; ")


def differences_of_complete(old: JsonObject, new: JsonObject) -> str:
    """What keeps a complete target from being what a run would make, for people; both are facts of a manifest."""
    if old.get("format") != new["format"]:
        return f"complete, and {_other_version(old, new)}"
    # By their sizes, times and headers source files are the same, wherever they lie: a node may have its own path.
    old_files, new_files = (
        {file: tuple(known.values()) for file, known in facts["source"]["files"].items()} for facts in (old, new)
    )
    found = _source_differences(old["source"]["path"], old_files, new["source"]["path"], new_files)
    found += _value_differences("--", old["flags"], new["flags"])
    if not found and any(old[name] != new[name] for name in ("plan", "settings", "conversion")):
        found = ["its files are planned differently, or its arguments differ"]
    return names(found, _SHOWN, "; ")


def _other_version(old: JsonObject, new: JsonObject) -> str:
    return f"made by another version (format {old.get('format', 1)}, {new['format']} now)"


def _source_differences(old_path: str, old: JsonObject, new_path: str, new: JsonObject) -> list[str]:
    """In what the files of two sources differ; of other paths only that they do."""
    found = list(_file_differences(old, new))
    return [f"made from {old_path}; this one from {new_path}"] if found and old_path != new_path else found


def _file_differences(old: JsonObject, new: JsonObject) -> Iterator[str]:
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
            yield f"{file} has a different header"


def _value_differences(kind: str, old: JsonObject, new: JsonObject) -> Iterator[str]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            label = kind + (name.removesuffix("_bytes").replace("_", "-") if kind == "--" else name)
            yield f"{label} was {old.get(name)}, now {new.get(name)}"


_YEAR_9999_NS = 253_370_764_800 * 10**9


def _time(nanoseconds: int) -> str:
    if not 0 <= nanoseconds < _YEAR_9999_NS:  # the calendar ends
        return f"{nanoseconds} ns after 1970"
    return datetime.fromtimestamp(nanoseconds / 1e9).astimezone().isoformat(sep=" ", timespec="milliseconds")


#: In the partial directory while starting again may be all it takes: what a job script looks for before it does.
RESUMABLE = "resumable"
IDENTITY_FILE, LOCK = "identity.json", "lock"
#: Notes: what the old target was that this conversion moves aside; and nothing counts of what has been written, here
#: and on the target's other disks, so that the next run has to `forget` it.
REPLACES, VOID = "replaces", "void"
ASIDE_SUFFIX = ".replaced"


def partial_of(target: Path) -> Path:
    """Where a target is made before it gets its name."""
    return target.with_name(target.name + fs.PARTIAL_SUFFIX)


def aside_of(target: Path) -> Path:
    """Where a target that is replaced waits until its successor has its name."""
    return target.with_name(target.name + ASIDE_SUFFIX)


def files_below(directory: fs.Directory) -> dict[str, int]:
    """A target's files in the directory where it is made, by name, and their sizes in bytes."""
    files = {name: found.st_size for name, found in found_below(directory).items() if stat.S_ISREG(found.st_mode)}
    return {name: size for name, size in files.items() if name != RESUMABLE and not _is_of_journal(name)}


def _is_of_journal(name: str) -> bool:
    return name.startswith(f"{JOURNAL_DIRECTORY}/")


def is_ours(directory: fs.Root) -> bool:
    """Whether a conversion made a directory and has not ended."""
    return has_note(directory, IDENTITY_FILE)


def has_note(directory: fs.Root, note: str) -> bool:
    """Whether a run has left a note in a directory of ours."""
    return fs.is_file(directory, f"{JOURNAL_DIRECTORY}/{note}")


def read_note(directory: fs.Root, note: str) -> str:
    """What a note says, "" where there is none."""
    try:
        with fs.opened(directory, f"{JOURNAL_DIRECTORY}/{note}") as descriptor:
            return os.read(descriptor, 4096).decode(errors="replace")
    except OSError:
        return ""


def set_note(directory: fs.Directory, note: str, text: str = "") -> None:
    """Note something for later runs."""
    fs.replace_files(directory, {f"{JOURNAL_DIRECTORY}/{note}": text.encode()})


def is_made_of(directory: fs.Root, identity: JsonObject) -> bool:
    """Whether a conversion of this identity was begun in a directory, and has not ended, whatever its name is."""
    return is_ours(directory) and not _differences(directory, identity)


def _differences(directory: fs.Root, identity: JsonObject) -> str:
    try:
        return differences(_read_identity(directory), identity)
    except (OSError, SourceError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return "the record of its source and flags cannot be read"


#: Far more than any has: args of a few hundred names, and a digest for each file of the source.
_MOST_IDENTITY_BYTES = 16 << 20


def _read_identity(directory: fs.Root) -> JsonObject:
    with fs.opened(directory, name := f"{JOURNAL_DIRECTORY}/{IDENTITY_FILE}") as descriptor:
        return parse_json(os.pread(descriptor, _MOST_IDENTITY_BYTES, 0), str(directory / name))


def check_partial(partial: fs.Directory, identity: JsonObject, sizes: Mapping[str, int], *, overwrite: bool) -> None:
    """Check what earlier runs left of a target; makes nothing.

    Args:
        sizes: in bytes, of the weights files that are made in this directory.
        overwrite: whether what cannot be resumed may be thrown away.

    Raises:
        TargetExists: something that no conversion left has the partial directory's name.
        ResumeRefused: an unfinished conversion that this one cannot go on with, without `overwrite`.
        TargetBusy: it is at work.
    """
    if _is_new(partial):
        return
    if not is_ours(partial):
        expected = f"nothing, or a directory with {JOURNAL_DIRECTORY}/{IDENTITY_FILE}"
        raise in_the_way(partial.path, "was not left by a conversion", expected)
    check_unlocked(partial, f"{JOURNAL_DIRECTORY}/{LOCK}", partial)
    if not overwrite and (refused := _obstacle(partial, identity, sizes)):
        raise refused


def in_the_way(partial: Path, what: str, expected: str = "", found: str = "") -> TargetExists:
    """The error about something else that lies where the target is made."""
    remedy = "move it away, then start the same command again; or choose another target"
    return TargetExists(f"the target's .partial directory {what}", partial, expected, found, remedy)


def exchanged(partial: Path) -> TargetExists:
    """The error about another directory than the one in which this conversion has begun."""
    found = "" if os.path.lexists(partial) else "nothing"
    return in_the_way(partial, "is not the one that this conversion began with", found=found)


def is_gone_on_with(partial: fs.Root, identity: JsonObject, sizes: Mapping[str, int], *, overwrite: bool) -> bool:
    """Whether a conversion takes up what is there; one that may overwrite does not where the last one found no way."""
    has_way = not overwrite or fs.is_file(partial, RESUMABLE)
    return is_ours(partial) and has_way and _obstacle(partial, identity, sizes) is None


@contextlib.contextmanager
def held_partial(partial: Path, parent: fs.Directory | None = None) -> Iterator[fs.Directory]:
    """Hold what lies where a target is made, see `held`.

    Raises:
        TargetExists: somebody else may have prepared it, or may change it while it is used.
        OSError: the operating system's.
    """
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(fs.held(partial, parent))
            found, is_of_others = os.fstat(directory.descriptor), _is_of_others(directory)
        except (NotADirectoryError, PermissionError):
            found, is_of_others = partial.lstat(), True
        if is_of_others:
            what = f"a directory of user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}"
            if not stat.S_ISDIR(found.st_mode):
                what = "a link" if stat.S_ISLNK(found.st_mode) else "no directory"
            raise TargetExists(
                "the target's .partial directory may belong to somebody else",
                partial,
                expected=f"a directory of user {os.geteuid()} that nobody else can write",
                found=what,
                remedy="choose another target, move it away, or, if all of it is yours, run chmod -R go-w on it",
            )
        yield directory


def _is_of_others(partial: fs.Directory) -> bool:
    """Whether another user owns a directory, or can write it."""
    found = os.fstat(partial.descriptor)
    if found.st_uid == os.geteuid() and not found.st_mode & _OF_OTHERS:
        return False
    # Some network file systems show all files as somebody else's, or as everybody's: so they show a new one.
    try:
        name = f"{JOURNAL_DIRECTORY}-{secrets.token_hex(8)}"
        with fs.opened(partial, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            os.fchmod(descriptor, 0o600)
            usual = os.fstat(descriptor)
            os.unlink(name, dir_fd=partial.descriptor)
    except OSError:
        return True
    return found.st_uid != usual.st_uid or bool(found.st_mode & _OF_OTHERS & ~usual.st_mode)


#: The right of others to write.
_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def _is_new(partial: fs.Directory) -> bool:
    """Whether nothing is there but what `locked_target` makes before the identity."""
    names = fs.names_in(partial)
    try:
        inside = fs.names_in(partial, JOURNAL_DIRECTORY) if JOURNAL_DIRECTORY in names else set()
    except OSError:
        return False
    made = all(name == LOCK or fs.TEMPORARY.fullmatch(name) for name in inside)
    return made and names <= {JOURNAL_DIRECTORY, RESUMABLE}


def _obstacle(partial: fs.Root, identity: JsonObject, sizes: Mapping[str, int]) -> ResumeRefused | None:
    """Why a conversion cannot go on with what is there, if it cannot."""
    if different := _differences(partial, identity):
        return ResumeRefused(
            "another unfinished conversion is in the target's .partial directory",
            partial,
            found=different,
            remedy="to resume it, give the flags it was started with; or start over with --overwrite",
        )
    for name, found in found_below(partial).items():
        path = partial / name
        if stat.S_ISDIR(found.st_mode):
            if name in sizes or path.parent.name == JOURNAL_DIRECTORY:
                return damaged(path, "a directory in a file's place")
        elif not fs.is_plain(found):
            return damaged(path, "a link, a pipe or a hard-linked file")
        elif found.st_size > sizes.get(name, found.st_size):
            return damaged(path, f"{found.st_size} bytes, more than the {sizes[name]} it can have")
    return None


def damaged(path: Path, found: str) -> ResumeRefused:
    """The error about something in a partial directory that no conversion leaves there."""
    return ResumeRefused(
        "an unfinished conversion was changed or damaged, and cannot be resumed",
        path,
        found=found,
        remedy="start over with --overwrite, or choose another target",
    )


@contextlib.contextmanager
def locked_target(
    target: Path, parent: fs.Directory, identity: JsonObject, sizes: Mapping[str, int], *, overwrite: bool
) -> Iterator[fs.Directory]:
    """Make the partial directory, or take up one that passes `check_partial`; nobody else has it within the block."""
    with contextlib.ExitStack() as stack:
        directory = None
        with contextlib.suppress(OSError):
            directory = stack.enter_context(fs.held(target, parent))
        if directory and is_made_of(directory, identity):  # only the last steps are missing
            _lock(directory, stack)
            yield directory
            return
        with fs.writing(partial := partial_of(target)):
            with contextlib.suppress(FileExistsError):
                os.mkdir(partial.name, 0o700, dir_fd=parent.descriptor)
            directory = stack.enter_context(held_partial(partial, parent))
            check_partial(directory, identity, sizes, overwrite=overwrite)
            _lock(directory, stack)
            if not directory.is_named(partial.name, parent):  # it may be complete by now
                remove(directory, f"{JOURNAL_DIRECTORY}/{LOCK}")
                raise exchanged(partial)
            _restore_aside(target, directory, parent)
            if not overwrite and is_ours(directory) and (refused := _obstacle(directory, identity, sizes)):
                raise refused
            if not is_gone_on_with(directory, identity, sizes, overwrite=overwrite):
                _start_anew(directory, parent, identity)
            elif not fs.is_file(directory, RESUMABLE):
                _mark_resumable(directory)
        yield directory


def _lock(directory: fs.Directory, stack: contextlib.ExitStack) -> None:
    lock = Lock(directory, f"{JOURNAL_DIRECTORY}/{LOCK}", directory)
    stack.callback(remove_journal, directory)
    stack.callback(lock.release)


def remove_journal(directory: fs.Directory) -> None:
    """Remove the journal's directory, where nothing is left in it.

    Network file systems keep a file that is removed while it is open, as the lock is: call it once more when it is not.
    """
    with contextlib.suppress(OSError):
        os.rmdir(JOURNAL_DIRECTORY, dir_fd=directory.descriptor)


def _mark_resumable(partial: fs.Directory) -> None:
    fs.write_file(partial, RESUMABLE, b"unfinished: start the same command again to resume\n")


def _start_anew(partial: fs.Directory, parent: fs.Directory, identity: JsonObject) -> None:
    """Begin in a directory that is new, or empty one of ours: its journals first, which speak of all else in it."""
    kept = {JOURNAL_DIRECTORY, *(f"{JOURNAL_DIRECTORY}/{name}" for name in (IDENTITY_FILE, LOCK, VOID))}
    forget(partial)
    for name in found_below(partial).keys() - kept:
        if name.removeprefix(f"{JOURNAL_DIRECTORY}/").count("/") == 0:
            remove(partial, name)
    remove(partial, f"{JOURNAL_DIRECTORY}/{VOID}")
    _mark_resumable(partial)
    set_note(partial, IDENTITY_FILE, json.dumps(identity, indent=1))
    fs.sync(partial)
    fs.sync(parent)


def forget(partial: fs.Directory) -> None:
    """Remove the journals, so that nothing counts of what has been written."""
    for name in journals(partial):
        remove(partial, f"{JOURNAL_DIRECTORY}/{name}")
    fs.sync(partial, JOURNAL_DIRECTORY)


def _restore_aside(target: Path, partial: fs.Directory, parent: fs.Directory) -> None:
    """Give a target its name back that was moved aside by a run that ended before its successor had the name."""
    if not os.path.lexists(target) and is_moved_aside(target, partial):
        rename_to_new(parent.descriptor, aside_of(target).name, parent.descriptor, target.name)
        fs.sync(parent)


def look(target: Path) -> str:
    """What a target is at this moment: its inode, and a digest of what lies in it; "" where there is nothing."""
    if not os.path.lexists(target):
        return ""
    found = found_below(target.resolve()) if target.is_dir() else {}
    lines = [
        [name, one.st_mode, *([one.st_size, one.st_mtime_ns] if fs.is_plain(one) else [])]
        for name, one in found.items()
    ]
    return f"{target.lstat().st_ino} {hashlib.sha256(json.dumps(lines).encode()).hexdigest()}"


def is_moved_aside(target: Path, directory: fs.Root) -> bool:
    """Whether what waits aside is what the conversion that makes a directory has moved there, and nothing else."""
    return read_note(directory, REPLACES) == (look(aside_of(target)) or None)


def used_bytes(partial: Path) -> int:
    """What a directory of ours has on its disk already, and is free for its successor."""
    return sum(found.st_blocks * 512 for found in found_below(partial).values()) if is_ours(partial) else 0


def refuse_unfinished(path: Path, name: str | None = None) -> None:
    """Refuse to read what a conversion is making, or has left unfinished, under its own name or another.

    Args:
        path: a Hugging Face directory, or a Megatron checkpoint's root or iteration.
        name: of the iteration in it.

    Raises:
        SourceError: naming the conversion's source, and how to go on with it.
    """
    if any(made and os.path.lexists(path / made) for made in fs.waiting_files(path).values()):
        raise SourceError(
            "new files of the model have not yet replaced the old ones",
            path,
            remedy="run the interrupted dist-convert tokenizer again: it continues where it stopped",
        )
    for place in _places(path, name):
        if is_ours(place) and (place.name.endswith(fs.PARTIAL_SUFFIX) or fs.is_file(place, RESUMABLE)):
            found = "what a conversion has made so far"
            with contextlib.suppress(OSError, SourceError, LookupError, TypeError):
                if place.stat().st_uid == os.geteuid():
                    found = f"what a conversion of {_read_identity(place)['flags']['source']} has made so far"
            raise SourceError(
                "an unfinished conversion, which is no checkpoint yet",
                place,
                found=found,
                remedy="wait for that conversion if it is running, else start its command again: it continues where it "
                "stopped",
            )


def _places(path: Path, name: str | None) -> Iterator[Path]:
    for place in (path, *([path / name] if name else [])):
        yield place if os.path.lexists(place) else partial_of(place)
    if name is None and path.is_dir():
        below = sorted(place for place in path.iterdir() if place.is_dir())
        if all(place.name.endswith(fs.PARTIAL_SUFFIX) for place in below):
            yield from below
