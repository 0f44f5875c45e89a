"""The file at a Megatron checkpoint's root that names its newest iteration (docs/formats.md, "The tracker file")."""

from __future__ import annotations

import os
from pathlib import Path

from dist_convert.read.checkpoint import TRACKER_FILE
from dist_convert.write.file_writer import target_error
from dist_convert.write.sync import sync


def write_tracker(root: Path, iteration: int | None) -> None:
    """Name an iteration, or a release where it is None, by replacing the file as a whole.

    Raises:
        TargetError, NotEnoughSpace: the file system refuses.
    """
    replace_text(root / TRACKER_FILE, "release" if iteration is None else str(iteration))


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old one or the new one, and nothing between."""
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        sync(path.absolute().parent)
    except OSError as error:
        raise target_error(error, str(path)) from error
