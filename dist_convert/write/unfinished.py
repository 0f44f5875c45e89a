"""An unfinished conversion is no checkpoint: its files have their final sizes, with holes where nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dist_convert.errors import SourceError
from dist_convert.read.checkpoint import TRACKER_FILE
from dist_convert.write.partial import PARTIAL_SUFFIX, RESUMABLE, flags_of, is_ours, partial_of


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
            flags = flags_of(place)
            raise SourceError(
                "an unfinished conversion, which is no checkpoint yet",
                file=str(place),
                found=f"what a conversion of {flags.get('load_path') or flags.get('load_dir')} has made so far",
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
