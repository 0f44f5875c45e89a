"""What goes wrong with a source file itself: it cannot be read, or it is not the file any more that it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_convert.errors import SourceChanged, SourceError

#: For each file, its size in bytes, its inode and the time of its last change in ns: see `same_file.stamp`.
Listing = Mapping[str, Sequence[int]]

BACK_OR_ANEW = (
    "let nothing write to the source, then start anew with --overwrite; or put the file back, with its time, and start "
    "the same command again"
)


def source_error(error: OSError, file: str, *, tensor: str = "", expected: str = "") -> SourceError:
    """The error of ours for an operating system's refusal to read."""
    return SourceError(
        "cannot read the source",
        tensor=tensor,
        file=file,
        expected=expected,
        found=error.strerror or str(error),
        remedy="check its disk or network file system on every node",
    )


@contextmanager
def reading(file: str | Path) -> Iterator[None]:
    """Within it a source file or directory is read.

    Raises:
        SourceError: for an `OSError` inside.
    """
    try:
        yield
    except OSError as error:
        raise source_error(error, str(file)) from error


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
            tensor=tensor,
            file=file,
            expected=f"{size_bytes} bytes, as when the conversion began",
            found=f"{found.st_size} bytes"
            + (", written to or replaced since" if found.st_size == size_bytes else ", cut or replaced since"),
            remedy=BACK_OR_ANEW,
        )


def open_to_read(path: Path) -> int:
    """A descriptor; a pipe that has come in the file's place keeps nobody waiting for its writer.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def changed_files(directory: Path, known: Listing) -> list[str]:
    """Which files are not what they were; each is opened, which makes network file systems ask their server.

    Raises:
        SourceError: one cannot be opened.
    """
    changed = []
    for file, before in known.items():
        try:
            with reading(file):
                descriptor = open_to_read(directory / file)
                try:
                    check_unchanged(os.fstat(descriptor), before, file)
                finally:
                    os.close(descriptor)
        except SourceChanged:
            changed.append(file)
    return changed
