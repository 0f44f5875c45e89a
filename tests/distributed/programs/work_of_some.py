"""Every rank's program for three ranks. Two of them work for longer than a collective may take, or one of them fails.

`work_of_some DIRECTORY FAILING` writes to `DIRECTORY/RANK` when a rank ended its work and returned, or its error.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dist_convert.errors import ConversionError, LostRank
from dist_convert.ranks.collectives import join_world, leave_world, run_on

#: How long a collective waits, and how long each rank works.
TIMEOUT_SECONDS, WORK_SECONDS = 3.0, (0.0, 60.0, 4.0)


def main(directory: Path, failing: int) -> None:
    """Take part in the work of ranks 0 and 2."""
    world = join_world("cpu", TIMEOUT_SECONDS)
    ended = [0.0]

    def work() -> None:
        if world.rank == failing:
            raise ConversionError("the work failed")
        time.sleep(WORK_SECONDS[world.rank])
        ended[0] = time.monotonic()

    try:
        run_on(world, [0, 2], work)
        said: object = (ended[0], time.monotonic())
        leave_world(world)
    except (ConversionError, LostRank) as error:
        said = error.what
    (directory / str(world.rank)).write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
