"""A rank of a timed conversion: `timed_rank.py REPORT FLAGS...` runs dist_convert and writes down what it took.

`REPORT/rankN.json` then has the clock when the rank began to move bytes and when it had written the last (`moved`),
the CPU seconds that it used in between (`moved_cpu_seconds`), the clock when files were on the disk (`synced`, of the
ranks that see to that), the bytes that it received from collectives (`gathered_bytes`) and its peak resident memory
(`peak_bytes`). The clock is the machine's monotonic one, the same for all ranks. Two functions are wrapped where
`dist_convert.run` calls them; nothing inside them is touched.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dist_convert.run
from dist_convert.__main__ import main
from dist_convert.move.pipeline import Moved
from dist_convert.report import peak_memory_bytes


def timed(function: Callable[..., Any], name: str, record: dict[str, Any]) -> Callable[..., Any]:
    """The function, with its beginning, its end and its CPU seconds put down under a name."""

    def call(*arguments: Any, **named: Any) -> Any:
        began, cpu_seconds = time.monotonic(), time.process_time()
        result = function(*arguments, **named)
        record[name] = [began, time.monotonic()]
        record[f"{name}_cpu_seconds"] = time.process_time() - cpu_seconds
        if isinstance(result, Moved):
            record["gathered_bytes"] = result.gathered_bytes
        return result

    return call


if __name__ == "__main__":
    seen: dict[str, Any] = {}
    for name, function in (("moved", "move"), ("synced", "sync_files")):
        setattr(dist_convert.run, function, timed(getattr(dist_convert.run, function), name, seen))
    exit_code = main(sys.argv[2:])
    seen["peak_bytes"] = peak_memory_bytes()
    (Path(sys.argv[1]) / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    sys.exit(exit_code)
