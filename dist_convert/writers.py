"""Which ranks write which target files: all of them any, but where a file system takes a file from one node only."""

from __future__ import annotations

from dataclasses import dataclass

from dist_convert.move.exchange import World, gather_objects
from dist_convert.plan.content import Content
from dist_convert.plan.one_node import with_parts, writable_by_one_node
from dist_convert.task import Task
from dist_convert.write.file_system import ONE_WRITER, file_system_type


@dataclass(frozen=True)
class Writers:
    """What a task's plan is made from, besides what ranks see of the source.

    Attributes:
        content: the task's, in parts that ranks of one node can do.
        writable: for each rank, the target files that it writes.
        notes: for the user, before anything is written.
    """

    content: Content
    writable: tuple[frozenset[str], ...]
    notes: tuple[str, ...] = ()


def find_writers(task: Task, world: World) -> Writers:
    """Ask the file systems of all places which ranks may write what; every rank calls it, and gets the same answer.

    The task itself stays as it is: what was begun on other nodes, or another file system, can be gone on with.
    """
    nodes_of = {place: set[int]() for place in task.places}
    for node, place in zip(world.nodes, task.places, strict=True):
        nodes_of[place].add(node)
    kinds: list[str] = gather_objects(world, file_system_type(task.partial))
    # Any rank speaks for its place: the node that serves a file system to the others sees it under another type.
    found = {
        place: kind
        for place, kind in zip(task.places, kinds, strict=True)
        if kind in ONE_WRITER and len(nodes_of[place]) > 1
    }
    if not found:
        return Writers(task.content, task.writable)
    dealt = [place if place in found else -1 for place in task.places]
    writable = writable_by_one_node(task.content, task.visible, task.writable, dealt, world.nodes)
    note = f"the target lies on {', '.join(sorted(set(found.values())))}: each weights file is written by one node"
    of_nodes = dict(zip(world.nodes, writable, strict=True))
    idle = sum(not files for files in of_nodes.values())
    if idle:
        what = "a larger grid" if task.content.sides.to_megatron else "smaller files (--max-shard-size)"
        note += f"; {idle} of {len(of_nodes)} nodes have none, {what} would share the work"
    return Writers(with_parts(task.content, writable), writable, (note,))
