"""A timed conversion: `timed_rank.py REPORT FLAGS...` runs dist_convert, and each rank writes down what it took.

`REPORT/rankN.json` then has the clock when the rank began to move bytes and when it had written the last (`moved`),
the CPU seconds that it used in between (`moved_cpu_seconds`), the clock when files were on the disk (`synced`, of the
ranks that see to that), the bytes that it received from others (`gathered_bytes`) and its peak resident memory
(`peak_bytes`); after a dry run, sending rank, receiving rank and bytes of its team's messages, step by step
(`messages`). The clock is the machine's monotonic one, the same for all ranks. Functions are wrapped where
`dist_convert.api` calls them; nothing inside is touched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dist_convert.__main__
from dist_convert.__main__ import importing, main

with importing():  # as the command does
    import dist_convert.api
    from dist_convert.move.pipeline import Moved
    from dist_convert.plan.plan import Plan
    from dist_convert.plan.steps import messages, steps_of
    from dist_convert.ranks.collectives import World, barrier

from tests.benchmarks.machine import COPY

#: In the report's directory: what to copy first, and where to.
COPY_FIRST = "copy_first.json"


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


def noting_messages(load_of: Callable[..., Any], record: dict[str, Any]) -> Callable[..., Any]:
    """`report.load_of`, which only dry runs call, with the messages between the members of a rank's team put down."""

    def call(plan: Plan, rank: int) -> Any:
        team = plan.teams[plan.place_of(rank)[0]].ranks
        steps = (messages(step) for step in steps_of(plan, rank) if step.send_bytes)
        record["messages"] = [[(team[m.sender], team[m.receiver], m.size_bytes) for m in of_step] for of_step in steps]
        return load_of(plan, rank)

    return call


def copy_and_remove(source: Path, target: Path) -> tuple[float, float]:
    """Copy a directory and remove the copy: the memory that it takes is then quick to be written; seconds, CPU seconds.

    On a virtual machine the first writes to memory that its host has taken back take several times as long.
    """
    began, before = time.monotonic(), os.times()
    subprocess.run([*COPY, str(source), str(target)], check=True)
    shutil.rmtree(target)
    after = os.times()
    cpu_seconds = sum(after[:4]) - sum(before[:4])
    return time.monotonic() - began, cpu_seconds


def after_copying(function: Callable[..., Any], copied: Sequence[str], record: dict[str, Any]) -> Callable[..., Any]:
    """`pipeline.move` with something copied and removed before it, on rank 0; it begins on all ranks at once."""

    def call(plan: Plan, world: World, *arguments: Any, **named: Any) -> Any:
        if world.rank == 0:
            record["copying"] = copy_and_remove(*map(Path, copied))
        barrier(world)
        return function(plan, world, *arguments, **named)

    return call


def reporting(function: Callable[..., int], directory: Path, record: dict[str, Any]) -> Callable[..., int]:
    """`be_rank`, with the record written down at its end."""

    def call(*arguments: Any) -> int:
        exit_code = function(*arguments)
        record["peak_bytes"] = peak_bytes()
        (directory / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(record))
        return exit_code

    return call


def peak_bytes() -> int:
    """The most resident memory that this process has had: the kernel's high-water mark.

    getrusage also counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024


if __name__ == "__main__":
    seen: dict[str, Any] = {}
    run = vars(dist_convert.api)
    run["move"] = timed(run["move"], "moved", seen)
    first = Path(sys.argv[1]) / COPY_FIRST
    if first.exists():
        run["move"] = after_copying(run["move"], json.loads(first.read_text()), seen)
    run["sync_files"] = timed(run["sync_files"], "synced", seen)
    run["load_of"] = noting_messages(run["load_of"], seen)
    commands = vars(dist_convert.__main__)
    commands["be_rank"] = reporting(commands["be_rank"], Path(sys.argv[1]), seen)
    sys.exit(main(sys.argv[2:]))
