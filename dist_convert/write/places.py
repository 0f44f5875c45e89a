"""Finds out which ranks see the target as one directory: a shared file system, or each node's own disk."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from dist_convert.errors import TargetError, UsageError
from dist_convert.move.exchange import World, gather_objects
from dist_convert.write.commit import existing_parent
from dist_convert.write.file_writer import target_error

_PROBE = ".dist_convert-"
#: What is so much older than a run's own probe was left by a rank that was killed. By the file system's own clock.
_LEFT_BEHIND_SECONDS = 24 * 3600.0


def find_places(world: World, target: Path, flag: str) -> tuple[int, ...]:
    """For each rank, the number of the place where its target lies; 0 for all on a shared file system.

    One rank of each node puts an empty file beside the target, and every rank looks which of them it sees. The files
    are removed again, and so are those that a killed run left there the day before.

    Args:
        world: this rank.
        target: the directory that is to be made.
        flag: that named it, for messages.

    Raises:
        TargetError: no file can be made beside the target.
        UsageError: ranks of one node have different targets.
    """
    if world.size == 1:
        return (0,)
    parent = existing_parent(target)
    parent = parent if parent.is_dir() else parent.parent
    probe = None
    if world.rank in world.first_ranks:
        probe = f"{_PROBE}{secrets.token_hex(8)}"
        try:
            (parent / probe).touch(exist_ok=False)
            _remove_left_behind(parent, probe)
        except OSError as error:
            raise target_error(error, str(target)) from error
    try:
        probes: list[str | None] = gather_objects(world, probe)
        # Looked for by name: a listing may be minutes old on a network file system.
        seen = [name for name in probes if name is not None and os.path.lexists(parent / name)]
        views: list[list[str]] = gather_objects(world, [str(target), *seen])
    finally:
        if probe is not None:
            (parent / probe).unlink(missing_ok=True)
    for rank, node in enumerate(world.nodes):
        first = world.nodes.index(node)
        if views[rank] != views[first]:
            raise UsageError(
                "ranks of one node have different targets",
                expected=f"{views[first][0]} as on the first rank of node {node}",
                found=f"{views[rank][0]} on rank {rank}",
                remedy=f"give all ranks of a node the same {flag}",
            )
    kinds = list(dict.fromkeys(tuple(view) for view in views))
    return tuple(kinds.index(tuple(view)) for view in views)


def refuse_several_places(places: tuple[int, ...], target: Path, flag: str, remedy: str) -> None:
    """Refuse a target that is not one directory for all ranks.

    Raises:
        TargetError: naming a rank that sees another one.
    """
    for rank, place in enumerate(places):
        if place:
            raise TargetError(
                "the target is not the same directory on all nodes",
                file=str(target),
                expected="one directory on a file system that all nodes share",
                found=f"rank {rank} sees another one than rank 0",
                remedy=f"check that the file system of {flag} is mounted on every node{remedy}",
            )


def _remove_left_behind(parent: Path, probe: str) -> None:
    """Remove the probes of runs that ended while they looked around; others may be at it now."""
    now = (parent / probe).stat().st_mtime
    for path in parent.glob(f"{_PROBE}*"):
        with contextlib.suppress(OSError):  # another run was quicker, or it is another user's
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and not found.st_size and now - found.st_mtime > _LEFT_BEHIND_SECONDS:
                path.unlink()
