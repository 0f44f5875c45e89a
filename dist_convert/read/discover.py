"""What all ranks together see of a source: who can read which file, and every header, read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_convert.errors import CheckpointNotFound, InconsistentShards
from dist_convert.move.exchange import World, gather_objects


@dataclass(frozen=True)
class Discovery:
    """The files of a source.

    Attributes:
        headers: each file's header as JSON, by file.
        visible: for each rank, the files that it can read.
        headers_of: for each rank, the files whose headers it read.
    """

    headers: dict[str, Any]
    visible: tuple[frozenset[str], ...]
    headers_of: tuple[tuple[str, ...], ...]


def discover(world: World, listing: Mapping[str, int], read_header: Callable[[str], Any], expected: str) -> Discovery:
    """Read each header on one rank that sees the file, and give all of them to all ranks.

    Args:
        world: this rank.
        listing: the files that this rank sees, with their sizes in bytes.
        read_header: a file's header in JSON values.
        expected: what kind of file was looked for, for messages.

    Raises:
        CheckpointNotFound: no rank sees any file.
        InconsistentShards: two ranks see files of different sizes under one name.
    """
    listings: list[dict[str, int]] = gather_objects(world, dict(listing))
    sizes_bytes: dict[str, int] = {}
    for rank, seen in enumerate(listings):
        for file, size_bytes in seen.items():
            if sizes_bytes.setdefault(file, size_bytes) != size_bytes:
                raise InconsistentShards(
                    "two ranks see different files under one name",
                    file=file,
                    expected=f"{sizes_bytes[file]} bytes",
                    found=f"{size_bytes} bytes on rank {rank}",
                    remedy="nodes hold shards of different runs; remove the wrong ones",
                )
    if not sizes_bytes:
        raise CheckpointNotFound("no rank sees any weights", expected=expected, found="none")
    headers_of = deal_headers(sorted(sizes_bytes), listings)
    mine = {file: read_header(file) for file in headers_of[world.rank]}
    headers = {file: header for of_rank in gather_objects(world, mine) for file, header in of_rank.items()}
    return Discovery(headers, tuple(frozenset(seen) for seen in listings), headers_of)


def deal_headers(files: Sequence[str], listings: Sequence[Mapping[str, int]]) -> tuple[tuple[str, ...], ...]:
    """Give each file to the rank, of those that see it, that has the fewest so far."""
    dealt: list[list[str]] = [[] for _ in listings]
    for file in files:
        seeing = [rank for rank, listing in enumerate(listings) if file in listing]
        dealt[min(seeing, key=lambda rank: len(dealt[rank]))].append(file)
    return tuple(tuple(of_rank) for of_rank in dealt)
