"""What all ranks together see of a source: who can read which file, and every header, read once."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_convert.errors import CheckpointNotFound, InconsistentShards
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.record_checks import Checksums
from dist_convert.read.source import Listing, file_signature, reading, sample_digest
from dist_convert.records import FilesOfRanks, JsonObject, StoredTensor


@dataclass(frozen=True)
class Discovery:
    """The files of a source.

    Attributes:
        headers: each file's header as JSON, by file.
        listings: for each rank, the files that it can read.
        headers_of: for each rank, the files whose headers it read.
        listing: that of this rank.
        checksums: of each file, the offset, size and CRC-32 of each record that has one, all of them in one array.
        identity: of each file, the size in bytes, the time of the last change in ns, and a digest of the header.
    """

    headers: JsonObject
    listings: Sequence[Listing]
    headers_of: tuple[tuple[str, ...], ...]
    listing: Listing
    identity: dict[str, tuple[int, int, str]]
    checksums: Checksums = field(default_factory=dict)

    @cached_property
    def visible(self) -> FilesOfRanks:
        """For each rank, the names of the files that it can read."""
        return tuple(map(frozenset, self.listings))

    def with_checksums(self, stored: Iterable[StoredTensor]) -> "Discovery":
        """The same with the records of those tensors that have a checksum."""
        found: dict[str, array[int]] = {}
        for one in stored:
            if one.checksum is not None:
                found.setdefault(one.file, array("Q")).extend((one.offset_bytes, one.size_bytes, one.checksum))
        return replace(self, checksums=found)


def discover(
    world: World, directory: Path, files: Iterable[str], read_header: Callable[[str], Any], expected: str
) -> Discovery:
    """Read each header on one rank that sees the file, and give all of them to all ranks.

    Args:
        directory: of the source, as this rank sees it, with the `files` that it sees.
        read_header: gives a file's header in JSON values.
        expected: what kind of file was looked for, for messages.

    Raises:
        CheckpointNotFound: no rank sees any file.
        InconsistentShards: two ranks see different files under one name.
    """
    mine = {}
    for file in files:
        with reading(file):
            mine[file] = file_signature(directory / file)
    listings = gather_listings(world, mine)
    names = sorted(frozenset[str]().union(*listings))
    if not names:
        remedy = "copy the checkpoint again, complete, from where it was saved"
        raise CheckpointNotFound("no rank sees any weights", expected=expected, found="none", remedy=remedy)
    check_same_files(world, directory, listings, read_header)
    headers_of = deal_headers(names, listings)
    read = {file: read_header(file) for file in headers_of[world.rank]}
    headers = {file: header for of_rank in gather_objects(world, read) for file, header in of_rank.items()}
    return Discovery(headers, listings, headers_of, mine, _identity(headers, listings))


def _identity(headers: JsonObject, listings: Sequence[Listing]) -> dict[str, tuple[int, int, str]]:
    """What tells a later run that the source is still the same; of several copies the oldest speaks for all."""
    found = {}
    for file, header in headers.items():
        sizes_and_times = [(listing[file][0], listing[file][2]) for listing in listings if file in listing]
        found[file] = (*min(sizes_and_times), _digest(header))
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def gather_listings(world: World, mine: Listing) -> list[Listing]:
    """Every rank's listing; where all see the same, as on a shared file system, only its digest travels."""
    if len(set(gather_objects(world, _digest(mine)))) == 1:
        return [mine] * world.size
    return gather_objects(world, mine)


def check_same_files(
    world: World, directory: Path, listings: Sequence[Listing], read_header: Callable[[str], Any]
) -> None:
    """Refuse different files of one name; copies on several machines are told from them by a sample of their bytes.

    Headers are compared too: those of rank files have checksums of their tensors.

    Raises:
        InconsistentShards: naming the file and two ranks.
    """
    sampled_by: dict[str, list[int]] = {}
    for file in sorted(frozenset[str]().union(*listings)):
        first_of: dict[tuple[int, ...], int] = {}
        for rank, listing in enumerate(listings):
            if file in listing:
                first_of.setdefault(tuple(listing[file]), rank)
        if len(first_of) > 1:
            sampled_by[file] = list(first_of.values())
    if not sampled_by:
        return
    mine = {
        file: sample_digest(directory / file, file) + _digest(read_header(file))
        for file, ranks in sampled_by.items()
        if world.rank in ranks
    }
    samples = gather_objects(world, mine)
    for file, (first, *others) in sampled_by.items():
        size_bytes = listings[first][file][0]
        for rank in others:
            other_bytes = listings[rank][file][0]
            if size_bytes != other_bytes or samples[first][file] != samples[rank][file]:
                content = " of other content" if size_bytes == other_bytes else ""
                raise InconsistentShards(
                    "two ranks see different files under one name",
                    directory / file,
                    expected=f"{size_bytes} bytes as on rank {first}",
                    found=f"{other_bytes} bytes{content} on rank {rank}",
                    remedy="nodes hold files of different runs, or a damaged copy: copy the right one to all of them",
                )


def deal_headers(files: Sequence[str], listings: Sequence[JsonObject]) -> tuple[tuple[str, ...], ...]:
    """Give each file to the rank, of those that see it, that has the fewest so far."""
    dealt: list[list[str]] = [[] for _ in listings]
    for file in files:
        seeing = [rank for rank, listing in enumerate(listings) if file in listing]
        dealt[min(seeing, key=lambda rank: len(dealt[rank]))].append(file)
    return tuple(tuple(of_rank) for of_rank in dealt)
