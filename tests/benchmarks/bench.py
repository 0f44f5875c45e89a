"""Compares conversions with copying the same bytes: `python tests/benchmarks/bench.py`.

Makes Megatron checkpoints of random weights and the Hugging Face directories of them, and then, round by round in
shuffled order, after rounds that are not counted, times

* `cp`: one `cp --reflink=never` of files that hold the weights and nothing else, and `sync` of the copies;
* `ours`: dist_convert with every number of ranks and placement that is asked for; also from a checkpoint with an
  optimizer's state beside the weights, which is left where it is, and from fp32 weights, which become bf16;
* `torchrun`: the same with ranks that torchrun starts instead of `--ranks`, for what the whole command takes;
* `gloo`: the same ranks passing what a conversion gathers between their memories, and doing nothing else;
* `transformers`: what a user does without a converter: load the Hugging Face model, save it again.

The *data phase* lasts from the first byte moved to the last byte written, *synced* until the files are on the disk as
well, and *whole* is the command as a user gives it, with the start of Python. What is copied is what conversions make,
to the byte. Before each run, untimed, the last one's target is removed, what is read next is brought into the page
cache, and the disk is given time to finish; directly before the data phase of `cp` and of `ours`, untimed as well, what
`cp` copies is copied and removed, as memory that a virtual machine's host has taken back is slow when it is first
written. Targets are judged by medians; the fp32 model has half the layers, so its
ratios are of seconds for a byte read. Where ranks gather, each of them sees its own shards only.

With `--json FILE` the rounds of earlier runs count as well: the same command goes on until all have been timed. What
others are compared with is then timed again beside them.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.cases import BESIDE, DIRECTIONS, SOURCES, Case, prepare, ready_ways, scratch
from tests.benchmarks.chart import chart
from tests.benchmarks.machine import code_digest, describe
from tests.benchmarks.measured import Measured
from tests.benchmarks.results import report
from tests.benchmarks.sources import GRIDS
from tests.benchmarks.store import Kept, read, write
from tests.benchmarks.summary import fill
from tests.benchmarks.ways import Ready

#: Exit code where the time was up before all rounds were timed.
UNFINISHED = 3


def measure(
    ready: Sequence[Ready],
    before: Sequence[Measured],
    given: argparse.Namespace,
    is_over: Callable[[], bool],
    keep: Callable[[Sequence[Measured]], None],
) -> bool:
    """Run every way once a round, in another order each time; warm-up rounds come first and do not count.

    Args:
        ready: the ways.
        before: what earlier runs have measured of each.
        given: the command line's `rounds`, `warm_ups` and `seed`.
        is_over: whether no other round should begin.
        keep: takes what is measured, after every round.

    Returns:
        Whether every way has all its rounds.
    """
    measured = list(before)
    number = 0
    while lacking := [which for which, one in enumerate(measured) if len(one.samples) < given.rounds]:
        if is_over():
            return False
        done = min(len(measured[which].samples) for which in lacking)
        # What others are compared with is timed in every round, so that no way is judged by what was before it.
        chosen = sorted({*lacking, *(which for which, one in enumerate(ready) if one.way.is_reference)})
        random.Random(f"{given.seed} {number} {done}").shuffle(chosen)
        for which in chosen:
            shutil.rmtree(ready[which].target, ignore_errors=True)
            ready[which].warm()
            os.sync()  # what has been removed keeps no disk busy, and nothing else is waiting to be written
            sample = ready[which].run()
            shutil.rmtree(ready[which].target)
            if number >= given.warm_ups:
                measured[which] = replace(measured[which], samples=(*measured[which].samples, sample))
        number += 1
        what = f"round {done + 1} of {given.rounds}" if number > given.warm_ups else "a round that does not count"
        print(what, file=sys.stderr, flush=True)
        keep(measured)
    return True


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", nargs="+", choices=sorted(GRIDS), default=sorted(GRIDS), help="(default: all)")
    add("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="(default: both)")
    add("--placement", nargs="+", choices=("direct", "gather"), default=["direct", "gather"], help="(default: both)")
    add("--ranks", nargs="+", type=int, default=[1, 2], help="numbers of ranks (default: 1 2)")
    add("--source", nargs="+", choices=SOURCES, default=SOURCES, help="what to convert (default: all)")
    add(
        "--beside",
        nargs="*",
        choices=BESIDE,
        default=BESIDE,
        help="what to time besides cp (default: all; bare: nothing)",
    )
    add("--grid", help="such as TP4xPP2 (default: TP4xPP2 for Llama, TP2xEP4 for Mixtral)")
    add("--size-gb", type=float, help="of the weights that are read (default: 2)")
    add("--quick", action="store_true", help="other defaults: 0.2 GB, three rounds after one")
    add("--rounds", type=int, help="that count (default: 7)")
    add("--warm-ups", type=int, help="rounds before those (default: 2)")
    add("--seconds", type=float, default=float("inf"), help="begin no round later than this; the exit code is 3 then")
    add("--seed", type=int, default=0, help="of the order within rounds")
    add(
        "--directory", type=Path, help="of sources, which stay for the next run, and targets (default: a temporary one)"
    )
    add("--prepare", action="store_true", help="only make the sources, in --directory")
    add("--json", type=Path, help="keep every sample in this file, and go on where it ends")
    add("--show", nargs="+", type=Path, help="measure nothing, but show what --json has kept")
    add("--chart", type=Path, help="draw what was measured, or is shown, as SVG")
    add("--fill", nargs="+", type=Path, default=[], help="put it into its places in these files, see `summary.py`")
    given = parser.parse_args()
    defaults = (
        {"size_gb": 0.2, "rounds": 3, "warm_ups": 1} if given.quick else {"size_gb": 2.0, "rounds": 7, "warm_ups": 2}
    )
    for name, value in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.prepare and given.directory is None:
        parser.error("--prepare needs --directory")
    return given


def start(given: argparse.Namespace, directory: Path) -> Kept:
    """What earlier runs have kept, or nothing yet."""
    fresh = Kept(tuple(describe(directory)), code_digest())
    if given.json is None or not given.json.exists():
        return fresh
    kept = read(given.json)
    if (kept.machine, kept.code) != (fresh.machine, fresh.code):
        sys.exit(f"{given.json} is of other code or another machine; remove it, or give another --json")
    return kept


def run(given: argparse.Namespace, directory: Path) -> tuple[Kept, bool]:
    """Measure all cases; what is kept then, and whether all rounds were timed."""
    end_seconds = time.monotonic() + given.seconds
    kept, is_complete = start(given, directory), True

    def keep(case: Case, measured: Sequence[Measured]) -> None:
        nonlocal kept
        kept = kept.put(case, measured)
        if given.json:
            write(given.json, kept)

    for family in given.family:
        grid = given.grid or GRIDS[family]
        size_bytes = prepare(directory, family, grid, "plain", int(given.size_gb * 1e9)).weights_bytes
        for direction in given.direction:
            case = Case(family, grid, direction, size_bytes)
            print(case.title, file=sys.stderr, flush=True)
            ready = ready_ways(given, case, directory)
            before = kept.of(case, ready)
            is_complete &= measure(ready, before, given, lambda: time.monotonic() > end_seconds, partial(keep, case))
    return kept, is_complete


def main() -> int:
    """Measure or show, and print a table for each family and direction."""
    given = parse()
    if given.show:
        all_kept, is_complete = [read(path) for path in given.show], True
    else:
        with scratch(given.directory) as directory:
            if given.prepare:
                for family in given.family:
                    for kind in given.source:
                        prepare(directory, family, given.grid or GRIDS[family], kind, int(given.size_gb * 1e9))
                return 0
            kept, is_complete = run(given, directory)
            all_kept = [kept]
    print("\n\n".join(map(report, all_kept)))
    if given.chart:
        given.chart.write_text(chart([result for kept in all_kept for result in kept.results]))
    for path in given.fill:
        fill(path, all_kept)
    if not is_complete:
        print("the time is up: the same command goes on", file=sys.stderr)
    return 0 if is_complete else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
