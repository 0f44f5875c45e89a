"""Every rank's program where one rank meets a fault: `faulty_rank RANK FAULT FLAGS...`.

The fault happens after that rank's first bytes have been written, when the others are busy or wait in a collective:
`kill` ends the rank without a word, `stop` stops it as it is, `cut:FILE` cuts a source file short, `fill:FILE` takes
the space that a file system has left, `run:COMMAND` runs a command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import dist_convert.ranks.channel
from dist_convert.__main__ import main


def commit(fault: str) -> None:
    """Make the fault happen."""
    kind, _, file = fault.partition(":")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "cut":
        os.truncate(file, 100)
    elif kind == "fill":
        fill(Path(file))
    elif kind == "run":
        subprocess.run(file.split(), check=True)
    else:
        raise ValueError(fault)


def fill(file: Path) -> None:
    """Write zeros to a file until nothing more fits."""
    with file.open("wb", buffering=0) as output, suppress(OSError):
        while True:
            output.write(bytes(4096))


class FaultyChannel(dist_convert.ranks.channel.Channel):
    """A channel in which the first report of progress brings the fault."""

    rank, fault = "", ""

    def add_progress(self, size_bytes: int) -> None:
        """Report, after the fault."""
        if size_bytes and self.fault and os.environ["RANK"] == self.rank:
            fault, self.fault = self.fault, ""
            commit(fault)
        super().add_progress(size_bytes)


if __name__ == "__main__":
    FaultyChannel.rank, FaultyChannel.fault = sys.argv[1:3]
    dist_convert.ranks.channel.Channel = FaultyChannel  # type: ignore[misc]
    sys.exit(main(sys.argv[3:]))
