"""What is said where a checkpoint's directory is not there."""

from __future__ import annotations

from pathlib import Path

from dist_convert.errors import CheckpointNotFound


def no_directory(path: Path, kind: str) -> CheckpointNotFound:
    """The error about a path that is no directory.

    Args:
        path: as it was given.
        kind: of the directory, such as "checkpoint".
    """
    if path.exists():
        return CheckpointNotFound(
            f"a file, not a {kind} directory", file=str(path), remedy="give the directory that it lies in"
        )
    return CheckpointNotFound(
        f"the {kind} directory does not exist", file=str(path), remedy="check the path on every node"
    )
