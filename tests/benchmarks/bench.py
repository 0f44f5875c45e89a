"""Compares conversions with copying the same bytes: `python tests/benchmarks/bench.py`.

Makes Megatron checkpoints of random weights and the Hugging Face directories of them, and then, round by round in
shuffled order, after rounds that are not counted, times

* `cp`: one `cp --reflink=never` of files that hold the weights and nothing else, and `sync` of the copies;
* `ours`: dist_convert with every number of ranks and placement that is asked for; also from a checkpoint with an
  optimizer's state beside the weights, which is left where it is, and from fp32 weights, which become bf16.

The *data phase* lasts from the first byte moved to the last byte written, *synced* until the files are on the disk as
well, and *whole* is the command as a user gives it, with the start of Python. What is copied is what conversions make,
to the byte. Sources are in the page cache, if they fit; targets are removed before each run, untimed. Targets are
judged by medians; the fp32 model has half the layers, so its ratios are of seconds for a byte read.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.cases import DIRECTIONS, SOURCES, Case, prepare, ready_ways, scratch
from tests.benchmarks.results import Measured, read_json, table, write_json
from tests.benchmarks.sources import GRIDS
from tests.benchmarks.ways import Ready, Sample


def measure(ready: Sequence[Ready], rounds: int, warm_ups: int, seed: int) -> list[Measured]:
    """Run every way once a round, in another order each time; warm-up rounds come before and do not count."""
    samples: list[list[Sample]] = [[] for _ in ready]
    shuffle = random.Random(seed).shuffle
    for number in range(warm_ups + rounds):
        order = list(range(len(ready)))
        shuffle(order)
        for which in order:
            shutil.rmtree(ready[which].target, ignore_errors=True)
            sample = ready[which].run()
            shutil.rmtree(ready[which].target)
            if number >= warm_ups:
                samples[which].append(sample)
        print(f"round {number + 1} of {warm_ups + rounds}", file=sys.stderr, flush=True)
    return [Measured(one.way, tuple(taken)) for one, taken in zip(ready, samples, strict=True)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", nargs="+", choices=sorted(GRIDS), default=sorted(GRIDS), help="(default: all)")
    add("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="(default: both)")
    add("--placement", nargs="+", choices=("direct", "gather"), default=["direct", "gather"], help="(default: both)")
    add("--ranks", nargs="+", type=int, default=[1, 2], help="numbers of ranks (default: 1 2)")
    add("--source", nargs="+", choices=SOURCES, default=SOURCES, help="what to convert (default: all)")
    add("--grid", help="such as TP4xPP2 (default: TP4xPP2 for Llama, TP2xEP4 for Mixtral)")
    add("--size-gb", type=float, help="of the weights that are read (default: 2)")
    add("--quick", action="store_true", help="other defaults: 0.2 GB, three rounds after one")
    add("--rounds", type=int, help="that count (default: 7)")
    add("--warm-ups", type=int, help="rounds before those (default: 2)")
    add("--seed", type=int, default=0, help="of the order within rounds")
    add(
        "--directory",
        type=Path,
        help="for sources and targets; sources stay for the next run (default: a temporary one)",
    )
    add("--prepare", action="store_true", help="only make the sources, in --directory")
    add("--json", type=Path, help="keep every sample in this file")
    add("--show", nargs="+", type=Path, help="measure nothing, but show what --json has kept")
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


def main() -> int:
    """Measure, and print a table for each family and direction."""
    given = parse()
    if given.show:
        print("\n\n".join(table(*result) for path in given.show for result in read_json(path)))
        return 0
    results = []
    with scratch(given.directory) as directory:
        for family in given.family:
            grid = given.grid or GRIDS[family]
            if given.prepare:
                for kind in given.source:
                    prepare(directory, family, grid, kind, int(given.size_gb * 1e9))
                continue
            for direction in given.direction:
                size_bytes = prepare(directory, family, grid, "plain", int(given.size_gb * 1e9)).weights_bytes
                case = Case(family, grid, direction, size_bytes)
                ready = ready_ways(given, case, directory)
                results.append((case, measure(ready, given.rounds, given.warm_ups, given.seed)))
                print(table(*results[-1]) + "\n", flush=True)
                if given.json:
                    write_json(given.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
