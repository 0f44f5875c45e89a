"""A rank of `memory.py`: `peak_memory.py DIRECTORY FLAGS...` runs dist_convert and writes down what memory it needed.

The kernel's high-water mark of the process itself (VmHWM) is taken, because getrusage also counts what the parent held
when it started this process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dist_convert.__main__ import main


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024


if __name__ == "__main__":
    exit_code = main(sys.argv[2:])
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}").write_text(str(peak_bytes()))
    sys.exit(exit_code)
