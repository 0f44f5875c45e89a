"""Which node writes which target files, where not every node may write each of them.

On the nodes' own disks each weights file lies whole on one of them, with the name and the bytes that it has on a
shared one. On NFS, for instance, all nodes see a file and only one may write it: what a parameter has in files of
several nodes becomes a part for each of them, so that every node can read for itself what it writes.

Pure: integers and strings. A disk is a file system as ranks see it; nodes may share one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from dist_convert.plan.content import Content
from dist_convert.plan.copies import Ends, Transfer, bands, part_of, transfer_of
from dist_convert.records import FilesOfRanks

#: A disk is as good for a file as the one that holds most of its source, if it holds this share of that.
_ALIKE = 3 / 4


def deal_files(content: Content, visible: FilesOfRanks, disks: Sequence[int]) -> tuple[frozenset[str], ...]:
    """For each disk, the weights files that lie there: where most of their source is, or else where least is written.

    It depends on what each disk sees, and not on how many ranks it has.

    Args:
        visible: for each rank, the source files that it can read.
        disks: for each rank, the number of its disk.
    """
    alike = disks_alike(content, visible, disks)
    dealt: list[list[str]] = [[] for _ in range(max(disks) + 1)]
    filled_bytes = [0] * len(dealt)
    for file in content.files:
        chosen = min(alike[file.name], key=lambda disk: filled_bytes[disk])
        dealt[chosen].append(file.name)
        filled_bytes[chosen] += file.size_bytes
    return tuple(map(frozenset, dealt))


def disks_alike(content: Content, visible: FilesOfRanks, disks: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """For each target file, the disks that see about equally much of its source, and no disk sees more of it."""
    numbers = range(max(disks) + 1)
    seen = [frozenset[str]().union(*(visible[r] for r, of in enumerate(disks) if of == disk)) for disk in numbers]
    held_bytes = {file.name: [0] * len(seen) for file in content.files}
    for transfer in content.transfers:
        shares = [sum(any(f in files for f in piece) for piece in transfer.source_files) for files in seen]
        for file, size_bytes in zip(transfer.target_files, transfer.target_bytes, strict=True):
            for disk, share in enumerate(shares):
                held_bytes[file][disk] += size_bytes * share // len(transfer.source_files)
    return {
        file: tuple(disk for disk in numbers if held[disk] >= _ALIKE * max(held)) for file, held in held_bytes.items()
    }


def file_numbers(content: Content, files: frozenset[str]) -> str:
    """Which of the weights files some are, by their numbers from 1: `1-3, 5`."""
    numbers = [number for number, file in enumerate(content.files, start=1) if file.name in files]
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def notes_on_disks(flag: str, disks: Sequence[int], listed: Sequence[str]) -> list[str]:
    """What lies on each node's own disk, for the flag that asks for that."""
    if not max(disks):
        return [f"{flag} has no effect: all ranks see the same target"]
    notes = []
    for disk, files in enumerate(listed):
        ranks = [str(rank) for rank, of_rank in enumerate(disks) if of_rank == disk]
        notes.append(f"own disk of {'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)}: {files}")
    return notes


def writable_by_one_node(
    content: Content, visible: FilesOfRanks, writable: FilesOfRanks, disks: Sequence[int], nodes: Sequence[int]
) -> FilesOfRanks:
    """For each rank, the target files that it writes: those of its disk that are dealt to its node.

    Args:
        content, visible: see `deal_files`.
        writable: for each rank, the target files where its target lies.
        disks: for each rank, the number of that disk; where it does not matter who writes what, a negative one.
        nodes: for each rank, the number of its node.
    """
    found = list(writable)
    for disk in sorted({disk for disk in disks if disk >= 0}):
        ranks = [rank for rank, of_rank in enumerate(disks) if of_rank == disk]
        names = sorted({nodes[rank] for rank in ranks})
        numbers = [names.index(nodes[rank]) for rank in ranks]
        node_of_file = _deal(content, [visible[rank] for rank in ranks], writable[ranks[0]], numbers)
        for rank, number in zip(ranks, numbers, strict=True):
            found[rank] = frozenset(file for file, node in node_of_file.items() if node == number)
    return tuple(found)


def _deal(content: Content, visible: FilesOfRanks, files: frozenset[str], nodes: Sequence[int]) -> Mapping[str, int]:
    """The node of each file: the one that sees most of its source; where all see alike, stretches of equal bytes.

    Neighbours of a stretch share parameters: the files of a pipeline stage, and in it of an expert parallel rank.
    """
    alike = disks_alike(content, visible, nodes)
    sizes_bytes = {file.name: file.size_bytes for file in content.files if file.name in files}
    by_experts = sorted(content.transfers, key=lambda transfer: len(transfer.target_files))
    ordered = dict.fromkeys(f for transfer in by_experts for f in transfer.target_files) | dict.fromkeys(sizes_bytes)
    total_bytes, filled_bytes = sum(sizes_bytes.values()), [0] * (max(nodes) + 1)
    chosen = {}
    for file in (file for file in ordered if file in sizes_bytes):
        middle_bytes = 2 * sum(filled_bytes) + sizes_bytes[file]  # twice that, as bytes are whole
        node = middle_bytes * len(filled_bytes) // (2 * total_bytes)
        if len(alike[file]) < len(filled_bytes):
            node = min(alike[file], key=lambda node: filled_bytes[node])
        chosen[file] = node
        filled_bytes[node] += sizes_bytes[file]
    return chosen


def with_parts(content: Content, writable: FilesOfRanks) -> Content:
    """A content whose every transfer can be done by the ranks that write one and the same of these sets of files."""
    owners = {file: number for number, files in enumerate(dict.fromkeys(writable)) for file in files}
    parts = tuple(part for transfer in content.transfers for part in _parts(content.ends, transfer, owners))
    return replace(content, transfers=parts)


def _parts(ends: Ends, transfer: Transfer, owners: Mapping[str, int]) -> Iterator[Transfer]:
    """A transfer for each owner of its target files."""
    numbers = dict.fromkeys(owners[file] for file in transfer.target_files)
    if len(numbers) == 1:
        yield transfer
        return
    whole = bands(ends, transfer.names)
    for number in numbers:
        own = tuple(file for file in transfer.target_files if owners[file] == number)
        yield transfer_of(transfer.names, [part for part in (part_of(band, own) for band in whole) if part])
