"""Before a run of `interrupted_runs`: rank 1 reads nothing of its first gather until rank 0 has gone on without it.

Rank 0 makes a file when it has written of a weight that it reads after what goes into the first gather and before what
goes into the second. Rank 1 waits so long for it, and prints whether it came.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from dist_convert.move.pipeline import Tools, Work
from dist_convert.plan.steps import Step
from dist_convert.read.file_reader import FileReader

#: Cut along its columns, so it is gathered; the first of its kind.
FIRST_GATHERED = "decoder.layers.0.self_attention.linear_proj.weight"
#: Cut along its rows, so it stays with its rank. Each member sends 16 KiB of a layer, as much as one step holds.
READ_LATER = "model.layers.1.mlp.up_proj.weight"
PATIENCE_SECONDS = 20.0


def prepare(mark: str) -> None:
    """From now on, be the rank that goes on or the one that is late; `mark` is the file."""
    (go_on if os.environ["RANK"] == "0" else be_late)(Path(mark))


def is_there(mark: Path) -> bool:
    """Whether a file is made in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return mark.exists()


def go_on(mark: Path) -> None:
    """From now on, make the mark when the weight is written."""
    move = Work.move

    def marking(work: Work, tools: Tools, step: Step) -> Any:
        written = move(work, tools, step)
        if any(wanted.target.tensor == READ_LATER for wanted in step.writes):
            mark.touch()
        return written

    Work.move = marking  # type: ignore[method-assign]


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
