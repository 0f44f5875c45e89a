"""dist_convert on rank 0, and on rank 1 one that reads nothing of its first gather until rank 0 has gone on without it.

`late_member MARK FLAGS...`: rank 0 makes the file `MARK` when it has written of a weight that it reads after what goes
into the first gather and before what goes into the second. Rank 1 waits so long for it, and prints whether it came.
Blocks and steps are small, so that a small checkpoint has many.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import dist_convert.plan.copies

dist_convert.plan.copies.BLOCK_BYTES = 4096

import dist_convert.plan.limits  # noqa: E402  all others take the sizes from these two

dist_convert.plan.limits.STEP_BYTES = 16384

from dist_convert.__main__ import main  # noqa: E402
from dist_convert.read.file_reader import FileReader  # noqa: E402
from dist_convert.write.files import FileWriter  # noqa: E402

#: Cut along its columns, so it is gathered; the first of its kind.
FIRST_GATHERED = "decoder.layers.0.self_attention.linear_proj.weight"
#: Cut along its rows, so it stays with its rank. Each member sends 16 KiB of a layer, as much as one step holds.
READ_LATER = "model.layers.1.mlp.up_proj.weight"
PATIENCE_SECONDS = 20.0


def is_there(mark: Path) -> bool:
    """Whether a file is made in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return mark.exists()


def go_on(mark: Path) -> None:
    """From now on, make the mark when the weight is written."""
    write = FileWriter.write

    def marking(writer: FileWriter, view: Any, packed: memoryview) -> Any:
        written = write(writer, view, packed)
        if view.tensor == READ_LATER:
            mark.touch()
        return written

    FileWriter.write = marking  # type: ignore[method-assign]


def be_late(mark: Path) -> None:
    """From now on, wait for the mark before the first read of what is gathered."""
    read = FileReader.read
    waited: list[bool] = []

    def late(reader: FileReader, view: Any, *arguments: Any) -> Any:
        if view.tensor == FIRST_GATHERED and not waited:
            waited.append(is_there(mark))
            print("the other rank went on" if waited[0] else "the other rank waited", file=sys.stderr)
        return read(reader, view, *arguments)

    FileReader.read = late  # type: ignore[method-assign]


if __name__ == "__main__":
    (go_on if os.environ["RANK"] == "0" else be_late)(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
