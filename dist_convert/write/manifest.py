"""`conversion.json`: what a target is, from what it was made, and every file's size and checksum.

Nothing in it depends on the ranks, or on when or how often the conversion was started.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_convert.read.source import read_json
from dist_convert.write.checksums import KnownRange, checksum_of
from dist_convert.write.files import Written, replace_text, target_error
from dist_convert.write.journal import JOURNAL_DIRECTORY
from dist_convert.write.partial import RESUMABLE, differences_of_complete

MANIFEST_FILE = "conversion.json"


def known_ranges(written: Iterable[Written]) -> dict[str, list[KnownRange]]:
    """By file, in ascending order, the ranges whose checksums were taken when they were written."""
    ranges: dict[str, list[KnownRange]] = {}
    for window, checksum in written:
        if checksum is not None:
            ranges.setdefault(window.file, []).append((window.offset_bytes, window.run_bytes, checksum))
    return {file: sorted(of_file) for file, of_file in ranges.items()}


def file_record(path: Path, known: Sequence[KnownRange] = ()) -> dict[str, Any]:
    """A file's size and checksum; what the known ranges do not cover is read.

    Raises:
        CorruptFile, TargetError: the file cannot be read to its end.
    """
    try:
        size_bytes = path.stat().st_size
        return {"size_bytes": size_bytes, "crc32": f"{checksum_of(path, 0, size_bytes, known):08x}"}
    except OSError as error:
        raise target_error(error, str(path)) from error


def write_manifest(partial: Path, weights: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the manifest of a target that is complete but for it.

    Args:
        partial: the directory in which the target is made.
        weights: the records of the target's weights files by name, those that lie on other nodes' disks included.
        facts: what else is said.

    Raises:
        TargetError, NotEnoughSpace: the file system refuses.
    """
    here = {path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()}
    names = sorted(here | weights.keys())
    own = (JOURNAL_DIRECTORY + "/", RESUMABLE, MANIFEST_FILE)
    files = {name: weights.get(name) or file_record(partial / name) for name in names if not name.startswith(own)}
    path = partial / MANIFEST_FILE
    try:
        path.write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise target_error(error, MANIFEST_FILE) from error


def renew_manifest(target: Path, *, gone: Iterable[str], fresh: Iterable[str]) -> None:
    """Tell the manifest of a directory, if it has one, of files that were removed, and of others that were replaced.

    Raises:
        CorruptFile: it is not JSON.
        TargetError, NotEnoughSpace: the file system refuses.
    """
    if not (target / MANIFEST_FILE).is_file():
        return
    manifest = read_json(target / MANIFEST_FILE)
    files = {name: record for name, record in manifest["files"].items() if name not in set(gone)}
    files |= {name: file_record(target / name) for name in fresh}
    replace_text(
        target / MANIFEST_FILE, json.dumps({**manifest, "files": dict(sorted(files.items()))}, indent=2) + "\n"
    )


def is_converted(target: Path) -> bool:
    """Whether a directory is what some conversion has made, whatever is there besides."""
    try:
        manifest = json.loads((target / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)


def unknown_files(target: Path) -> list[str]:
    """The files of a converted directory that its manifest does not name."""
    named = {MANIFEST_FILE, RESUMABLE, *json.loads((target / MANIFEST_FILE).read_bytes())["files"]}
    here = (path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    return sorted(name for name in here if name not in named and not name.startswith(JOURNAL_DIRECTORY + "/"))


def is_complete(target: Path, facts: Mapping[str, Any], elsewhere: frozenset[str] = frozenset()) -> bool:
    """Whether a directory is what a conversion of these facts leaves, by its manifest and the sizes of its files.

    Args:
        target: the directory.
        facts: see `write_manifest`.
        elsewhere: files of the manifest that lie on other nodes' disks.
    """
    try:
        manifest = json.loads((target / MANIFEST_FILE).read_bytes())
        files = manifest["files"].items()
        sizes = {name: (target / name).stat().st_size for name, _ in files if name not in elsewhere}
        # By their sizes, times and headers source files are the same, wherever they lie: a node may have its own path.
        is_same = manifest["source"]["files"] == facts["source"]["files"] and all(
            manifest[name] == value for name, value in facts.items() if name not in ("versions", "source")
        )
        return is_same and all(record["size_bytes"] == sizes[name] for name, record in files if name in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def what_differs(target: Path, facts: Mapping[str, Any]) -> list[str]:
    """In what a directory is not what a conversion of these facts leaves; empty if no conversion left it.

    Args:
        target: the directory.
        facts: see `write_manifest`.
    """
    try:
        return differences_of_complete(json.loads((target / MANIFEST_FILE).read_bytes()), facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
