"""Where the target lies: one directory that all ranks see, or one on each node's own disk; and on what file system.

Rank 0 makes what is no weight and spreads it to the other disks, because only there everything may be found that it
is made from: a tokenizer, for instance.
"""

import contextlib
import errno
import os
import re
import secrets
from pathlib import Path

from dist_convert.errors import TargetError, UsageError
from dist_convert.ranks.collectives import World, broadcast, gather_objects
from dist_convert.write.files import Directory, is_plain, opened, write_file, writing
from dist_convert.write.partial import ASIDE_SUFFIX, files_below
from dist_convert.write.trees import existing_parent

_PROBE = ".dist_convert-"
#: For ".partial" and the longest path below a target: a tokenizer's file may have any name.
_BELOW_BYTES = 512
#: What is so much older than a run's own probe was left by a rank that was killed. By the file system's own clock.
_LEFT_BEHIND_SECONDS = 24 * 3600.0


def find_disks(world: World, target: Path, *, is_per_node: bool, otherwise: str) -> tuple[int, ...]:
    """For each rank, the number of the disk that holds its target; 0 for all on a shared file system.

    One rank of each node puts an empty file beside the target, and every rank looks which of them it sees. The files
    are removed again, and so are those that a killed run left there the day before.

    Args:
        is_per_node: nodes may have a disk each.
        otherwise: the flag for that, and when to give it.

    Raises:
        TargetError: no file can be made beside the target, or nodes see different ones that should not.
        UsageError: ranks of one node have different targets, or the target's name is too long or none.
    """
    parent = existing_parent(target) if target.name else target
    parent = parent if parent.is_dir() else parent.parent
    name_bytes, path_bytes = len(os.fsencode(target.name)), len(os.fsencode(target.absolute()))
    longest_bytes = os.pathconf(parent, "PC_NAME_MAX") - len(ASIDE_SUFFIX)
    longest_path_bytes = os.pathconf(parent, "PC_PATH_MAX") - _BELOW_BYTES
    if not 0 < name_bytes <= longest_bytes or path_bytes > longest_path_bytes:
        raise UsageError(
            "the target's name is not valid for a directory",
            target,
            expected=f"1 to {longest_bytes} bytes, in a path of at most {longest_path_bytes:,}, which leaves room for "
            "longer names beside it and for files below",
            found=f"{name_bytes} bytes, in a path of {path_bytes:,}",
            remedy="choose another target",
        )
    if world.size == 1:
        return (0,)
    probe = None
    if world.rank in world.first_ranks:
        probe = f"{_PROBE}{secrets.token_hex(8)}"
        with writing(target):
            (parent / probe).touch(exist_ok=False)
            _remove_left_behind(parent, probe)
    try:
        probes = gather_objects(world, probe)
        # Looked for by name: a listing may be minutes old on a network file system.
        seen = [name for name in probes if name is not None and os.path.lexists(parent / name)]
        views = gather_objects(world, [str(target), *seen])
    finally:
        if probe is not None:
            (parent / probe).unlink(missing_ok=True)
    for rank, node in enumerate(world.nodes):
        first = world.nodes.index(node)
        if views[rank] != views[first]:
            what, found = "ranks of one node have different targets", f"{views[rank][0]} on rank {rank}"
            expected = f"{views[first][0]} as on the first rank of node {node}"
            raise UsageError(what, expected=expected, found=found, remedy="give all ranks of a node the same target")
    if not is_per_node and (other := next((rank for rank, view in enumerate(views) if view != views[0]), None)):
        found = f"rank {other} sees another one than rank 0"
        expected = "one directory on a file system that all nodes share"
        remedy = f"check that its file system is mounted on every node, or give {otherwise}"
        raise TargetError("the target is not the same directory on all nodes", target, expected, found, remedy)
    kinds = list(dict.fromkeys(map(tuple, views)))
    return tuple(kinds.index(tuple(view)) for view in views)


def _remove_left_behind(parent: Path, probe: str) -> None:
    """Remove the probes of runs that ended while they looked around; others may be at it now."""
    now = (parent / probe).stat().st_mtime
    for path in parent.iterdir():
        with contextlib.suppress(OSError):  # another run was quicker, or it is another user's
            found = path.lstat() if re.fullmatch(rf"{re.escape(_PROBE)}[0-9a-f]{{16}}", path.name) else None
            if found and is_plain(found) and not found.st_size and now - found.st_mtime > _LEFT_BEHIND_SECONDS:
                path.unlink()


#: Clients of these keep pages of a file for themselves: where two of them write parts of one page at the same time, one
#: may send the other's part as it was before (docs/clusters.md, "Targets on NFS"). Names as in the kernel's mountinfo.
ONE_WRITER = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "afs"})

_PIECE_BYTES = 4 << 20


def spread_files(world: World, directory: Directory, weights: frozenset[str], *, receives: bool) -> None:
    """Copy all files of rank 0's directory, but for weights and journals, to the directories of some other ranks.

    Every rank takes part; `receives` is whether this one writes the copies.
    """
    mine = []
    if world.rank == 0:
        mine = [(name, size) for name, size in files_below(directory).items() if name not in weights]
    for name, size_bytes in gather_objects(world, mine)[0]:
        with writing(directory / name):
            if receives:
                write_file(directory, name, b"")
            is_open = receives or world.rank == 0
            with opened(directory, name, os.O_RDWR) if is_open else contextlib.nullcontext() as descriptor:
                for first in range(0, size_bytes, _PIECE_BYTES):
                    count = min(_PIECE_BYTES, size_bytes - first)
                    sent = b"" if receives or descriptor is None else os.pread(descriptor, count, first)
                    piece = broadcast(world, sent, count)
                    if receives and descriptor is not None and os.pwrite(descriptor, piece, first) != count:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
