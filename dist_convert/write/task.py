"""One conversion as its source and its target's format describe it, and which ranks write which of its files.

All ranks write any file, but where a file system takes a file from one node only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from dist_convert.options import Options
from dist_convert.plan.content import Content
from dist_convert.plan.file_owners import with_parts, writable_by_one_node
from dist_convert.ranks.collectives import World, gather_objects
from dist_convert.read.discover import Discovery
from dist_convert.records import FilesOfRanks, JsonObject, TargetFile
from dist_convert.write.checksums import KnownRanges
from dist_convert.write.files import Beside, Directory
from dist_convert.write.partial import partial_of
from dist_convert.write.target_disks import ONE_WRITER
from dist_convert.write.trees import file_system_type


class Source(Protocol):
    """What a conversion asks of its source, besides its catalog: its files, and the name of their format."""

    @property
    def directory(self) -> Path:
        """Of the files, as this rank sees it."""

    @property
    def found(self) -> Discovery:
        """The files, and which rank sees them."""

    @property
    def format(self) -> str: ...


class Target(Protocol):
    """What a conversion asks of a target's format, besides its catalog: its files, and all that is no weight.

    Every rank has it, and calls what it says of itself; `partial` is the directory in which the target is made.
    """

    @property
    def settings(self) -> JsonObject:
        """What the weights files' bytes depend on besides the source, in JSON values."""
        return {}

    def make_files(self, partial: Directory, files: Sequence[TargetFile], *, is_first: bool) -> None:
        """Make weights files in their final size; `is_first` on one rank, which also makes what may fail early."""

    def complete(self, partial: Directory, files: Sequence[TargetFile], known: KnownRanges, *, is_first: bool) -> None:
        """Complete some weights files, which no other rank does, and on one rank add all that is no weight.

        `known` are, by file, the ranges whose checksums were taken when they were written.
        """

    def beside(self) -> Mapping[str, Beside]:
        """Files that are replaced in the directory that holds the target, in this order, once it has its name."""
        return {}

    def next_step(self) -> str:
        """What is left for the user to do, for the very end; nothing where nothing is."""
        return ""


@dataclass(frozen=True)
class Task:
    """One conversion, ready to be divided over ranks.

    Attributes:
        job: what was asked for, with what the source or the defaults say where no flag does.
        content: every byte that is read and written.
        source: what is converted.
        target: the directory that gets its name when it is complete.
        rank: this one.
        disks: for each rank, the number of the disk that holds its target; 0 where all share one directory.
        writable: for each rank, the target files that it can write.
        notes: for the user, before anything is written.
        layout: what is made, besides the weights.
        is_divided: the disks hold parts of one target: each has some of its weights files, and a copy of all else.
    """

    job: Options
    content: Content
    source: Source
    target: Path
    rank: int
    disks: tuple[int, ...]
    writable: FilesOfRanks
    notes: Sequence[str]
    layout: Target
    is_divided: bool = False

    @property
    def partial(self) -> Path:
        """Where the target is made."""
        return partial_of(self.target)

    @property
    def first_ranks(self) -> list[int]:
        """The rank of each disk that makes and renames the target there."""
        return [rank for rank, disk in enumerate(self.disks) if self.disks.index(disk) == rank]

    @property
    def is_first(self) -> bool:
        return self.disks.index(self.disks[self.rank]) == self.rank

    @property
    def files(self) -> tuple[TargetFile, ...]:
        """The target files where this rank's target lies."""
        return tuple(file for file in self.content.files if file.name in self.writable[self.rank])

    @property
    def own_files(self) -> tuple[TargetFile, ...]:
        """Those of them that this rank alone completes."""
        on_disk = [rank for rank, disk in enumerate(self.disks) if disk == self.disks[self.rank]]
        return tuple(sorted(self.files, key=lambda file: file.name)[on_disk.index(self.rank) :: len(on_disk)])

    @property
    def elsewhere(self) -> frozenset[str]:
        """The names of the weights files that lie on other disks than this rank's, and belong to the same target."""
        names = frozenset(file.name for file in self.content.files) if self.is_divided else frozenset[str]()
        return names - self.writable[self.rank]


def find_writers(task: Task, world: World) -> Task:
    """Ask the file systems of all disks which ranks may write what; every rank calls it, and gets the same answer.

    The task itself stays as it is: what was begun on other nodes, or another file system, can be gone on with.

    Returns:
        What the task's plan is made from: its content in parts that ranks of one node can do, and for each rank the
        target files that it writes.
    """
    nodes_of = {disk: set[int]() for disk in task.disks}
    for node, disk in zip(world.nodes, task.disks, strict=True):
        nodes_of[disk].add(node)
    kinds = gather_objects(world, file_system_type(task.partial))
    # Any rank speaks for its disk: the node that serves a file system to the others sees it under another type.
    found = {
        disk: kind
        for disk, kind in zip(task.disks, kinds, strict=True)
        if kind in ONE_WRITER and len(nodes_of[disk]) > 1
    }
    if not found:
        return task
    dealt = [disk if disk in found else -1 for disk in task.disks]
    writable = writable_by_one_node(task.content, task.source.found.visible, task.writable, dealt, world.nodes)
    note = f"the target lies on {', '.join(sorted(set(found.values())))}: each weights file is written by one node"
    of_nodes = dict(zip(world.nodes, writable, strict=True))
    idle = sum(not files for files in of_nodes.values())
    if idle:
        what = "a larger grid" if task.content.ends.target.is_owned else "smaller files (--max-shard-size)"
        note += f"; {idle} of {len(of_nodes)} nodes have none, {what} would share the work"
    content = with_parts(task.content, writable)
    return replace(task, content=content, writable=writable, notes=[*task.notes, note])
