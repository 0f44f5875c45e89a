"""Every rank's program for three ranks: `gather_patterns DIRECTORY` gathers byte patterns in two groups, then in one.

Each rank writes what it received to `DIRECTORY/GROUP-RANK`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dist_convert.ranks import collectives
from dist_convert.ranks.collectives import World, gather_objects, join_world, leave_world, make_gatherer
from dist_convert.records import Message

#: Bytes that each member sends: words of every kind, a single word, and more than one network packet.
SIZES_BYTES = (256, 4, 1 << 18)
GROUPS = {"two-of-three": (0, 2), "all": (0, 1, 2)}


def pattern(rank: int, size_bytes: int) -> torch.Tensor:
    """All byte values, from another one on each rank: NaNs of every dtype with payloads, infinities, negative zeros."""
    return torch.arange(size_bytes, dtype=torch.int64).add(rank * 85).remainder(256).to(torch.uint8)


def gather(world: World, group: Sequence[int]) -> bytes:
    """This rank's part in the gathers of a group: all that it received."""
    gatherer = make_gatherer(world, group, max(SIZES_BYTES))
    assert gatherer is not None
    found = b""
    for size_bytes in SIZES_BYTES:
        received = torch.zeros(size_bytes * len(group), dtype=torch.uint8)
        members = range(len(group))
        everything = [Message(one, other, 0, size_bytes) for one in members for other in members if one != other]
        wait = collectives.begin_gather(gatherer, pattern(world.rank, size_bytes), received, everything)
        assert wait is not None
        wait()
        own = group.index(world.rank) * size_bytes
        received[own : own + size_bytes] = pattern(world.rank, size_bytes)  # which no message brings
        found += bytes(received.numpy())
    return found


def main(directory: Path) -> None:
    """Take part in the groups that have this rank."""
    world = join_world("cpu", 60.0)
    assert make_gatherer(world, (world.rank,), 4) is None
    for name, group in GROUPS.items():
        if world.rank in group:
            (directory / f"{name}-{world.rank}").write_bytes(gather(world, group))
    values = gather_objects(world, {"rank": world.rank, "text": "ü" * world.rank})
    (directory / f"objects-{world.rank}").write_text(repr(values))
    leave_world(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
