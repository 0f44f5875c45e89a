"""Files that are read whole, and so must not be large: a hostile one may be a hole of any size."""

from __future__ import annotations

from pathlib import Path

from dist_convert.errors import CorruptFile
from dist_convert.read.source_file import reading

#: Several times what the largest vocabularies need; an index of a million tensors.
MAX_BYTES = 100_000_000


def read_small_file(path: Path) -> bytes:
    """All of a file.

    Raises:
        CorruptFile: it is larger than `MAX_BYTES`.
        SourceError: it cannot be read.
    """
    with reading(path), path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise CorruptFile(
            "a file that is too large for its kind", file=str(path), expected=f"at most {MAX_BYTES} bytes"
        )
    return content
