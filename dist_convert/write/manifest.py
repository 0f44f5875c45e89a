"""`conversion.json`: what a target is, from what it was made, and every file's size and checksum.

Nothing in it depends on the ranks, or on when or how often the conversion was started.
"""

import json
import os
import stat
from bisect import bisect
from collections.abc import Iterable, Sequence
from pathlib import Path

from dist_convert.errors import CorruptFile, SourceError
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.source import read_json
from dist_convert.records import JsonObject
from dist_convert.write.checksums import KnownRange, checksum_of
from dist_convert.write.files import Directory, Written, held, opened, replace_files, write_file, writing
from dist_convert.write.journal import JOURNAL_DIRECTORY, ResumeState, fields, from_fields, joined
from dist_convert.write.partial import RESUMABLE, differences_of_complete, files_below, is_ours
from dist_convert.write.trees import found_below

MANIFEST_FILE = "conversion.json"
#: More than 100,000 files have, on both sides; a checkpoint of 16,384 ranks has two for each.
_MOST_BYTES, _MOST_VALUES = 32_000_000, 500_000


def known_ranges(world: World, mine: Iterable[Written], resume_state: ResumeState) -> dict[str, list[KnownRange]]:
    """By file, in ascending order, the ranges whose checksums were taken when a run of any rank wrote them."""
    gathered = gather_objects(world, [fields(one) for one in joined(mine)])
    ranges: dict[str, list[KnownRange]] = {}
    for window, checksum in (*resume_state.written, *(from_fields(one) for of_rank in gathered for one in of_rank)):
        if checksum is not None:
            ranges.setdefault(window.file, []).append((window.offset_bytes, window.run_bytes, checksum))
    return {file: sorted(of_file) for file, of_file in ranges.items()}


def file_record(root: Directory, name: str, known: Sequence[KnownRange] = ()) -> JsonObject:
    """A file's size and checksum, of which only what the known ranges do not cover is read."""
    with writing(root / name), opened(root, name) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        checksum = checksum_of(descriptor, str(root / name), 0, size_bytes, known)
        return {"size_bytes": size_bytes, "crc32": f"{checksum:08x}"}


def write_manifest(partial: Directory, weights: JsonObject, facts: JsonObject) -> None:
    """Write the manifest of a target that is complete but for it, with `facts` of `resume.facts_of`.

    `weights` are the records of its weights files by name, those that lie on other nodes' disks included.
    """
    names = sorted((files_below(partial).keys() | weights.keys()) - {MANIFEST_FILE})
    files = {name: weights.get(name) or file_record(partial, name) for name in names}
    write_file(partial, MANIFEST_FILE, _text({**facts, "files": files}).encode())


def renew_manifest(target: Path, *, gone: Iterable[str], fresh: Iterable[str]) -> None:
    """Tell the manifest of a directory, if it has one, of files that were removed, and of others that were replaced.

    Raises:
        CorruptFile: it is no manifest.
    """
    if not os.path.lexists(target / MANIFEST_FILE):
        return
    manifest = manifest_of(target)
    if not manifest:
        what = "conversion.json was not made by a conversion, and was not updated"
        remedy = "move it away; the files themselves are written"
        raise CorruptFile(what, target / MANIFEST_FILE, expected="what a conversion leaves", remedy=remedy)
    files = {name: record for name, record in manifest["files"].items() if name not in set(gone)}
    with held(target.resolve()) as directory:
        files |= {name: file_record(directory, name) for name in fresh}
        renewed = _text({**manifest, "files": dict(sorted(files.items()))})
        replace_files(directory, {MANIFEST_FILE: renewed.encode()})


def _text(manifest: JsonObject) -> str:
    return json.dumps(manifest, indent=2) + "\n"


def manifest_of(target: Path) -> JsonObject:
    """The manifest of a directory that some conversion has made, whatever is there besides; empty for any other."""
    try:
        manifest = read_json(target / MANIFEST_FILE, _MOST_BYTES, _MOST_VALUES)
    except SourceError:
        return {}
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else {}


def unknown_files(target: Path, manifest: JsonObject) -> list[str]:
    """All in a converted directory that its manifest does not name, links, pipes and empty directories, too."""
    known = sorted({MANIFEST_FILE, *manifest["files"]})
    below = found_below(target.resolve())
    found = below.keys() - known
    if is_ours(target):  # a run ended between giving it its name and removing its journal
        found = {name for name in found if name != RESUMABLE and name.split("/")[0] != JOURNAL_DIRECTORY}
    elif JOURNAL_DIRECTORY in found and stat.S_ISDIR(below[JOURNAL_DIRECTORY].st_mode):  # or while it removed that
        found -= {JOURNAL_DIRECTORY}  # what lies in it stays to be named
    return sorted(name for name in found if not _is_above_any(f"{name}/", known))


def _is_above_any(directory: str, names: Sequence[str]) -> bool:
    """Whether one of so many names, in ascending order, is below a directory, which ends with a slash."""
    place = bisect(names, directory)
    return place < len(names) and names[place].startswith(directory)


def what_differs(
    target: Path, manifest: JsonObject, facts: JsonObject, elsewhere: frozenset[str] = frozenset()
) -> str | None:
    """In what a directory is not what a conversion of these facts leaves, by its manifest and the sizes of its files.

    "" where it is just that; None where no conversion has left it. `elsewhere` are files on other nodes' disks.
    """
    try:
        different = differences_of_complete(manifest, facts)
        here = {name: record["size_bytes"] for name, record in manifest["files"].items() if name not in elsewhere}
        is_whole = all(
            (target / name).is_file() and (target / name).stat().st_size == size_bytes
            for name, size_bytes in here.items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return None
    return different if different or is_whole else "some of its files are gone or have another size"
