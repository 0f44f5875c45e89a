"""Gives every place of a target that lies on the nodes' own disks a copy of what is no weight.

Rank 0 makes these files, because only there everything may be found that they are made from: a tokenizer, for instance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from dist_convert.move.exchange import World, broadcast, gather_objects
from dist_convert.write.file_writer import target_error
from dist_convert.write.journal import JOURNAL_DIRECTORY
from dist_convert.write.partial import RESUMABLE

_PIECE_BYTES = 4 << 20


def spread_files(world: World, directory: Path, weights: frozenset[str], *, receives: bool) -> None:
    """Copy all files of rank 0's directory, but for weights and journals, to the directories of some other ranks.

    Args:
        world: this rank; every rank takes part.
        directory: in which the target is made, as this rank sees it.
        weights: names of the weights files.
        receives: whether this rank writes the copies.

    Raises:
        TargetError, NotEnoughSpace: the file system refuses.
    """
    mine = _sizes_bytes(directory, weights) if world.rank == 0 else []
    files: list[tuple[str, int]] = [(name, size) for name, size in gather_objects(world, mine)[0]]
    for name, size_bytes in files:
        try:
            _spread(world, directory / name, size_bytes, receives=receives)
        except OSError as error:
            raise target_error(error, str(directory / name)) from error


def _sizes_bytes(directory: Path, weights: frozenset[str]) -> Sequence[tuple[str, int]]:
    own = (JOURNAL_DIRECTORY + "/", RESUMABLE)
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return [
        (name, path.stat().st_size) for name, path in files.items() if name not in weights and not name.startswith(own)
    ]


def _spread(world: World, path: Path, size_bytes: int, *, receives: bool) -> None:
    if receives:
        path.parent.mkdir(parents=True, exist_ok=True)
    is_used = receives or world.rank == 0
    with path.open("wb" if receives else "rb") if is_used else contextlib.nullcontext() as file:
        for first in range(0, size_bytes, _PIECE_BYTES):
            count = min(_PIECE_BYTES, size_bytes - first)
            piece = broadcast(world, file.read(count) if file is not None and not receives else b"", count)
            if file is not None and receives:
                file.write(piece)
