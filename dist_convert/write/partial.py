"""`NAME.partial`, where a target is made, and the journal directory in it that says whose it is.

Only a directory with such a journal is ever taken up or emptied, and never read as a checkpoint. A new one appears
under its name complete, journal and lock inside, so that of two conversions that start together one finds the other.
What it is made from stands in its identity, by which a later run knows whether it may go on with it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dist_convert.errors import ResumeRefused, SourceError, TargetExists
from dist_convert.records import human_bytes, names
from dist_convert.write.files import TRACKER_FILE, replace_text, sync, writing
from dist_convert.write.journal import JOURNAL_DIRECTORY
from dist_convert.write.lock import Lock, check_unlocked

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
        ] or [f"version {old['version']} of the converter, {new['version']} now, which plans otherwise"]
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
_IDENTITY, _LOCK = "identity.json", "lock"
#: Notes: this conversion is what moves the old target aside, which it replaces; and nothing counts of what has been
#: written, here and at the target's other places, so that the next run has to `forget` it.
REPLACES, VOID = "replaces", "void"
PARTIAL_SUFFIX = ".partial"


def partial_of(target: Path) -> Path:
    """Where a target is made before it gets its name."""
    return target.with_name(target.name + PARTIAL_SUFFIX)


def aside_of(target: Path) -> Path:
    """Where a target that is replaced waits until its successor has its name."""
    return target.with_name(target.name + ".replaced")


def files_below(directory: Path) -> set[str]:
    """The names of a target's files in the directory where it is made."""
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    return {name for name in files - {RESUMABLE} if not name.startswith(JOURNAL_DIRECTORY + "/")}


def is_ours(directory: Path) -> bool:
    """Whether a conversion made a directory and has not ended."""
    return (directory / JOURNAL_DIRECTORY / _IDENTITY).is_file()


def has_note(directory: Path, note: str) -> bool:
    """Whether a run has left a note in a directory of ours."""
    return (directory / JOURNAL_DIRECTORY / note).exists()


def set_note(directory: Path, note: str, *, holds: bool = True) -> None:
    """Note something for later runs, or that it holds no more.

    Raises:
        OSError: the file system refuses.
    """
    path = directory / JOURNAL_DIRECTORY / note
    path.touch() if holds else path.unlink(missing_ok=True)
    sync(path.parent)


def is_made_of(directory: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a conversion of this identity was begun in a directory, and has not ended, whatever its name is."""
    return is_ours(directory) and not _differences(directory, identity)


def check_partial(target: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check what earlier runs left of a target; makes nothing.

    Args:
        target: final path.
        identity: of this conversion, see `resume.identity_of`.
        overwrite: whether what is being made of something else may be thrown away.

    Raises:
        TargetExists: something that no conversion left has the partial directory's name.
        ResumeRefused: an unfinished conversion of something else, without `overwrite`.
        TargetBusy: it is at work.
    """
    partial = partial_of(target)
    if _is_free(partial):
        return
    if not is_ours(partial):
        raise TargetExists(
            "what lies where the target is made was not left by a conversion",
            file=str(partial),
            expected=f"nothing, or a directory with {JOURNAL_DIRECTORY}/{_IDENTITY}",
            remedy="move it away or remove it yourself, or choose another target",
        )
    check_unlocked(partial / JOURNAL_DIRECTORY / _LOCK, str(partial))
    different = _differences(partial, identity)
    if different and not overwrite:
        raise ResumeRefused(
            "an unfinished conversion of something else is where the target is made",
            file=str(partial),
            found=different,
            remedy="to go on with it, start it as it was begun; or start anew with --overwrite",
        )


def _is_free(partial: Path) -> bool:
    return not os.path.lexists(partial) or (partial.is_dir() and not any(partial.iterdir()))


def _differences(directory: Path, identity: Mapping[str, Any]) -> str:
    try:
        return differences(json.loads((directory / JOURNAL_DIRECTORY / _IDENTITY).read_bytes()), identity)
    except (ValueError, KeyError, TypeError):
        return "the record of what it is made from cannot be read"


def claim(target: Path, identity: Mapping[str, Any], *, overwrite: bool) -> Lock:
    """Make the partial directory, or take up one that passes `check_partial`; nobody else has it until the release."""
    partial = partial_of(target)
    with writing(partial):
        if is_made_of(target, identity):  # only the last steps are missing
            return Lock(target / JOURNAL_DIRECTORY / _LOCK, str(target))
        if _is_free(partial) and (made := _make(partial, identity)):
            return made
        check_partial(target, identity, overwrite=overwrite)
        lock = Lock(partial / JOURNAL_DIRECTORY / _LOCK, str(partial))
        try:
            _restore_aside(target)
            if _differences(partial, identity):
                _start_anew(partial, identity)
            _mark_resumable(partial)
        except BaseException:
            lock.release()
            raise
        return lock


def _make(partial: Path, identity: Mapping[str, Any]) -> Lock | None:
    """Make the directory under another name first; None where somebody else was quicker."""
    fresh = partial.with_name(f".{partial.name}-{secrets.token_hex(4)}")
    (fresh / JOURNAL_DIRECTORY).mkdir(parents=True)
    lock = Lock(fresh / JOURNAL_DIRECTORY / _LOCK, str(partial))
    try:
        _write_record(fresh, identity)
        fresh.rename(partial)  # onto nothing, or onto an empty directory
        sync(partial.absolute().parent)
    except BaseException as error:
        lock.release()
        is_renamed = not fresh.exists()
        shutil.rmtree(fresh, ignore_errors=True)
        if is_renamed or _is_free(partial) or not isinstance(error, OSError):
            raise
        return None
    return lock


def _mark_resumable(partial: Path) -> None:
    (partial / RESUMABLE).write_text("unfinished: start the same command again to go on\n", encoding="utf-8")


def _write_record(partial: Path, identity: Mapping[str, Any]) -> None:
    _mark_resumable(partial)
    replace_text(partial / JOURNAL_DIRECTORY / _IDENTITY, json.dumps(identity, indent=1))
    sync(partial)


def forget(partial: Path) -> None:
    """Remove the journals, so that nothing counts of what has been written.

    Raises:
        OSError: the file system refuses.
    """
    for path in sorted((partial / JOURNAL_DIRECTORY).glob("run-*")):
        path.unlink()
    sync(partial / JOURNAL_DIRECTORY)


def _start_anew(partial: Path, identity: Mapping[str, Any]) -> None:
    """Empty a directory of ours: its journals first, so that none speaks of what is no longer there."""
    forget(partial)
    for path in sorted(partial.iterdir()):
        if path.name != JOURNAL_DIRECTORY:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    set_note(partial, VOID, holds=False)
    _write_record(partial, identity)


def _restore_aside(target: Path) -> None:
    """Give a target its name back that was moved aside by a run that ended before its successor had the name."""
    if not os.path.lexists(target) and os.path.lexists(aside_of(target)) and has_note(partial_of(target), REPLACES):
        aside_of(target).rename(target)
        sync(target.absolute().parent)


def used_bytes(partial: Path) -> int:
    """What a directory of ours has on its disk already, and is free for its successor."""
    if not is_ours(partial):
        return 0
    return sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())


def refuse_unfinished(path: Path, name: str | None = None) -> None:
    """Refuse to read what a conversion is making, or has left unfinished, under its own name or another.

    Args:
        path: a Hugging Face directory, or a Megatron checkpoint's root or iteration.
        name: of the iteration in it.

    Raises:
        SourceError: naming the conversion's source, and how to go on with it.
    """
    for place in _places(path, name):
        if is_ours(place) and (place.name.endswith(PARTIAL_SUFFIX) or (place / RESUMABLE).exists()):
            try:
                flags = dict(json.loads((place / JOURNAL_DIRECTORY / _IDENTITY).read_bytes())["flags"])
            except (OSError, ValueError, KeyError, TypeError):
                flags = {}
            source = flags.get("source") or flags.get("load_path") or flags.get("load_dir")
            raise SourceError(
                "an unfinished conversion, which is no checkpoint yet",
                file=str(place),
                found=f"what a conversion of {source} has made so far",
                remedy="wait for that conversion if it is at work, else start its command again: it goes on where it "
                "stopped",
            )


def _places(path: Path, name: str | None) -> Iterator[Path]:
    for place in (path, *([path / name] if name else [])):
        yield place if os.path.lexists(place) else partial_of(place)
    if name is None and path.is_dir() and not (path / TRACKER_FILE).exists():
        iterations = sorted([*path.glob("iter_*"), *path.glob("release*")])
        if all(place.name.endswith(PARTIAL_SUFFIX) for place in iterations):
            yield from iterations
