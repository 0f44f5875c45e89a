"""One bar on rank 0 over the bytes of all ranks; nothing where the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dist_convert.channel import Channel
from dist_convert.move.exchange import World


@contextmanager
def show_progress(world: World, channel: Channel, total_bytes: int, what: str = "converting") -> Iterator[None]:
    """Show what all ranks together have written until the block ends.

    Args:
        world: this rank.
        channel: that carries the ranks' counts.
        total_bytes: of the work of all ranks.
        what: is done, before the bar.
    """
    if world.rank != 0 or not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm  # only here: most runs have no terminal

    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, dynamic_ncols=True) as bar:

        def update(all_bytes: int) -> None:
            bar.update(all_bytes - bar.n)

        channel.show_progress(update)
        yield
        channel.show_progress(None)
        update(total_bytes)  # the last counts of other ranks may still be on their way
