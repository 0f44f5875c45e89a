"""Files of one name on the disks of several nodes: each is a copy of its own, and is compared where it lies."""

from __future__ import annotations

from dataclasses import replace

from dist_convert.move.exchange import World
from dist_convert.plan.node_local import name_at
from dist_convert.read.discover import gather_listings
from dist_convert.read.same_file import stamp
from dist_convert.records import View
from dist_convert.verify.catalog import Checkpoint, Region


def with_every_copy(checkpoint: Checkpoint, world: World) -> Checkpoint:
    """The checkpoint with a copy for each different file of one name, under `name_at` a number of its own.

    Args:
        checkpoint: as its files' names describe it.
        world: this rank.
    """
    seen = sorted(checkpoint.visible[world.rank])
    listings = gather_listings(world, {file: stamp(checkpoint.path / file) for file in seen})
    copies: dict[str, list[tuple[int, ...]]] = {}
    for listing in listings:
        for file, found in listing.items():
            known = copies.setdefault(file, [])
            if tuple(found) not in known:
                known.append(tuple(found))
    if all(len(known) == 1 for known in copies.values()):
        return checkpoint

    def every(view: View) -> list[View]:
        return [replace(view, file=name_at(number, view.file)) for number in range(len(copies[view.file]))]

    def regions(name: str) -> tuple[Region, ...]:
        return tuple(
            Region(region.box, tuple(copy for view in region.copies for copy in every(view)))
            for region in checkpoint.regions(name)
        )

    visible = tuple(
        frozenset(name_at(copies[file].index(tuple(found)), file) for file, found in listing.items())
        for listing in listings
    )
    return replace(checkpoint, regions=regions, visible=visible, is_at_places=True)
