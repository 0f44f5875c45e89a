"""A source's files: opened, read whole where they are small, known again, and what is said where that fails."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dist_convert.errors import CheckpointNotFound, CorruptFile, SourceChanged, SourceError
from dist_convert.records import human_bytes

#: For each file, its size in bytes, its inode and the time of its last change in ns: see `file_signature`.
Listing = Mapping[str, Sequence[int]]

BACK_OR_ANEW = (
    "make sure that nothing writes to the source, then start over with --overwrite; or put the file back, with its "
    "time, and start the same command again"
)


def source_error(error: OSError, file: object, *, tensor: str = "", expected: str = "") -> SourceError:
    """The error of ours for an operating system's refusal to read."""
    what, remedy = "cannot read the source", "check its disk or network file system on every node"
    return SourceError(what, file, expected, tensor=tensor, found=error.strerror or error, remedy=remedy)


@contextmanager
def reading(file: object, tensor: str = "") -> Iterator[None]:
    """Within it a source file or directory is read; an `OSError` inside becomes a SourceError."""
    try:
        yield
    except OSError as error:
        raise source_error(error, file, tensor=tensor) from error


def check_unchanged(found: os.stat_result, known: Sequence[int], file: str, tensor: str = "") -> None:
    """Compare what a file is now with what it was when its header was read.

    By size and time, as a later run does: network file systems may give a file a new inode whenever they like.

    Raises:
        SourceChanged: it has been written to, or replaced.
    """
    size_bytes, _, modified_ns = known
    if (found.st_size, found.st_mtime_ns) != (size_bytes, modified_ns):
        raise SourceChanged(
            "a source file has changed while it was read",
            file,
            tensor=tensor,
            expected=f"{size_bytes} bytes, as when the conversion began",
            found=f"{found.st_size} bytes, {'written to' if found.st_size == size_bytes else 'cut'} or replaced since",
            remedy=BACK_OR_ANEW,
        )


def open_to_read(path: Path) -> int:
    """A descriptor; a pipe that has come in the file's place keeps nobody waiting for its writer."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


#: What a clone without Git LFS has in place of large files, and their limit:
#: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
#: Of a read whose end is not asked for. Python takes a block of the file system, which a parallel one has in megabytes.
_READ_BYTES = 4096


@contextmanager
def opened_source(path: Path, file: str = "") -> Iterator[BinaryIO]:
    """A source file to be read, which messages name as `file`, or by its path.

    Raises:
        CorruptFile: it is no plain file, and may have no end, or a pointer to the file.
        SourceError: it cannot be opened, or read while it is open.
    """
    with reading(file or path), os.fdopen(open_to_read(path), "rb", buffering=_READ_BYTES) as opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise CorruptFile("not a regular file", file or path, found="a pipe, a device or something similar")
        if found.st_size < _POINTER_BYTES and os.pread(opened.fileno(), len(_POINTER), 0) == _POINTER:
            what, remedy = "a pointer of Git LFS in place of the file", "fetch the file itself with: git lfs pull"
            raise CorruptFile(what, file or path, found=f"{found.st_size} bytes of text", remedy=remedy)
        yield opened


def changed_files(directory: Path, known: Listing) -> list[str]:
    """Which files are not what they were: each is opened, which makes network file systems ask, or is a SourceError."""
    changed = []
    for file, before in known.items():
        try:
            with reading(file), os.fdopen(open_to_read(directory / file), "rb", buffering=0) as opened:
                check_unchanged(os.fstat(opened.fileno()), before, file)
        except SourceChanged:
            changed.append(file)
    return changed


_PIECES = 16
_PIECE_BYTES = 4096


def file_signature(path: Path) -> tuple[int, int, int]:
    """Size in bytes, inode and time of the last change: equal wherever one shared file is looked at."""
    found = path.stat()
    return found.st_size, found.st_ino, found.st_mtime_ns


def sample_digest(path: Path, file: str) -> str:
    """SHA-256 of evenly spaced pieces, the first and the last bytes among them.

    Weights of two trainings or of two iterations differ nearly everywhere, and so in any sample.

    Raises:
        SourceError: the file, named so in messages, cannot be read.
    """
    digest = hashlib.sha256()
    with opened_source(path, file) as opened:
        last_bytes = max(0, opened.seek(0, os.SEEK_END) - _PIECE_BYTES)
        for number in range(_PIECES):
            opened.seek(last_bytes * number // (_PIECES - 1))
            digest.update(opened.read(_PIECE_BYTES))
    return digest.hexdigest()


#: More than the largest vocabularies need (34 MB); an index of half a million tensors.
MAX_BYTES = 50_000_000
#: Values in JSON: each takes some hundred bytes of memory, and as few as two in the file. Settings are written again,
#: where a value gets a line of its own and two blanks for each level.
MOST_VALUES, _MOST_SETTINGS, _MOST_LEVELS = 2_000_000, 500_000, 32


def read_small_file(path: Path, most_bytes: int = MAX_BYTES) -> bytes:
    """All of a file; a CorruptFile where it is larger or no plain file, a SourceError where it cannot be read."""
    with opened_source(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes <= most_bytes:
            return file.read()
    expected = f"a file of at most {human_bytes(most_bytes)}"
    raise CorruptFile("a file that is too large for its kind", path, expected, found=human_bytes(size_bytes))


def check_values(content: bytes, most: int = MOST_VALUES) -> None:
    """Refuse JSON that would take much more memory than it is long.

    Raises:
        ValueError: it has more values than any model's files, or is large and not ASCII, which takes four times the
            memory.
    """
    if len(content) > MAX_BYTES and not content.isascii():
        raise ValueError(f"more than {human_bytes(MAX_BYTES)} with characters beyond ASCII")
    count = sum(map(content.count, (b",", b"[", b"{")))  # texts may have some, too
    if count > most:
        raise ValueError(f"about {count:,} values, more than the {most:,} that a valid file can have")


def read_json(path: Path, most_bytes: int = MAX_BYTES, most_values: int = _MOST_SETTINGS) -> dict[str, Any]:
    """A JSON object from a file, of settings unless it may have more values; for errors see `parse_json`."""
    return parse_json(read_small_file(path, most_bytes), str(path), most_values)


def parse_json(content: bytes, file: str, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """A JSON object from a file's content, named so in messages; a CorruptFile where it is none, or too much."""
    try:
        check_values(content, most_values)
        data = json.loads(content.decode("utf-8"))
        _check_levels(data)
    except (ValueError, RecursionError) as error:
        raise CorruptFile("not valid JSON", file, found=error) from error
    if not isinstance(data, dict):
        raise CorruptFile("not a JSON object", file, found=type(data).__name__)
    return data


def _check_levels(data: Any) -> None:
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(_MOST_LEVELS):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for values in inner for item in values if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {_MOST_LEVELS} deep")


def no_directory(path: Path, kind: str) -> CheckpointNotFound:
    """The error about a path that is no directory of a kind such as "checkpoint"."""
    if path.exists():
        return CheckpointNotFound(f"a file, not a {kind} directory", path, remedy="give the directory that holds it")
    return CheckpointNotFound(f"the {kind} directory does not exist", path, remedy="check the path on every node")


_MEMORY = Path("/proc/meminfo")


def usual_read_ahead(directory: Path) -> int:
    """How many blocks of 4 MiB the operating system is asked to read ahead from a directory.

    None on a block device: what Linux reads ahead by itself is in larger folios, which take half the time of a core.
    """
    device = directory.stat().st_dev
    return 0 if Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").exists() else 8


def pushes_others_out(streamed_bytes: int) -> bool:
    """Whether so many bytes, read and written, need more pages than are free, so that other files lose theirs.

    False where the system does not say what is free. Letting pages go takes a third of the time that reading them from
    the cache takes, so it is done only where it saves somebody theirs.
    """
    try:
        # Names and kibibytes (https://www.kernel.org/doc/html/latest/filesystems/proc.html, "meminfo"); free is what
        # nobody uses, not for a page cache either.
        free = re.search(r"^MemFree:\s*(\d+)", _MEMORY.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return False
    return free is not None and streamed_bytes > int(free[1]) * 1024
